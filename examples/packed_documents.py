# SPDX-License-Identifier: BSD-3-Clause
"""Documents packed into one sequence: sparse attention inside each of them, and none between them.

Checks itself: without a threshold every document's output is that of dense attention on the document alone. Exits 1 if
not.

    python examples/packed_documents.py --lengths 1500 700 2100
"""

import argparse
import sys

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sale_flex import AuxRequest, Mass, SaleConfig, mods, sale_attention
from sale_flex.testing import Shape, assert_attention_close, causal_mask, structured_inputs


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    """Print one line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1500, 700, 2100], help="tokens of each document")
    parser.add_argument("--threshold", type=float, default=0.01, help="share of a row's probability")
    args = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    total = sum(args.lengths)
    shape = Shape(total, total, heads=8, kv_heads=2, head_dim=64)
    query, key, value = structured_inputs(shape, device=device)

    ids = torch.arange(len(args.lengths), device=device).repeat_interleave(torch.tensor(args.lengths, device=device))
    inside_documents = mods.document(ids)  # causality is sale_attention's own

    def packed(threshold: float) -> tuple[Tensor, float]:
        config = SaleConfig(Mass(threshold), min_length=256)
        output, (_, stats) = sale_attention(
            query, key, value, config, mask_mod=inside_documents, return_aux=AuxRequest(stats=True)
        )
        return output, stats.density.mean().item()

    exact, _ = packed(0.0)
    dense = []
    for first, length in zip(ids.diff(prepend=ids[:1] - 1).nonzero()[:, 0].tolist(), args.lengths):
        alone = [x[:, :, first : first + length] for x in (query, key, value)]
        dense.append(scaled_dot_product_attention(*alone, is_causal=True, enable_gqa=True))
        mask = causal_mask(Shape(length, length), device)
        try:
            assert_attention_close(exact[:, :, first : first + length], *alone, mask)
        except AssertionError as error:
            print(f"document at {first}: {error}", file=sys.stderr)
            return 1
    output, density = packed(args.threshold)
    change = ((output - torch.cat(dense, 2)).norm() / output.norm()).item()
    print(
        f"{len(args.lengths)} documents in {total} tokens on {device}: density {density:.3f} of what documents show, "
        f"output changed by {change:.4f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
