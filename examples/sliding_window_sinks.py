# SPDX-License-Identifier: BSD-3-Clause
"""A sliding window, the first tokens always in sight, and a sink logit per head that takes probability (gpt-oss).

Checks itself: without a threshold the output is that of dense attention under the same mask, sinks included. Exits 1 if
not.

    python examples/sliding_window_sinks.py --length 4096 --window 1024
"""

import argparse
import sys

import torch
from torch import Tensor

from sale_flex import AuxRequest, Mass, SaleConfig, mods, sale_attention
from sale_flex.testing import Shape, structured_inputs


def dense(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, sink_logits: Tensor) -> Tensor:
    """Attention in which every row has one more logit, which has no value; float64 ``[B, Hq, S, D]``."""
    heads, dim = query.shape[1], query.shape[3]
    key, value = (x.double().repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    logits = (query.double() @ key.transpose(-1, -2) * dim**-0.5).masked_fill(~seen, -torch.inf)
    sinks = sink_logits.double()[:, None, None].expand(*logits.shape[:3], 1)
    return torch.cat([logits, sinks], -1).softmax(-1)[..., :-1] @ value


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    """Print one line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int, default=2048, help="tokens")
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--threshold", type=float, default=0.01, help="share of a row's probability")
    args = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = Shape(args.length, args.length, heads=4, kv_heads=2, head_dim=64)
    query, key, value = structured_inputs(shape, device=device)
    sink_logits = torch.linspace(-2.0, 4.0, 4, device=device)

    # A user's own mask joins a ready one; it says where its keys lie, so that no other block is looked at.
    first_tokens = mods.with_key_range(
        lambda b, h, q_idx, kv_idx: kv_idx < 4, lambda b, h, first_q, last_q: (first_q * 0, first_q * 0 + 3)
    )
    window_and_sinks = mods.or_masks(mods.sliding_window(args.window), first_tokens)

    def sparse(threshold: float) -> tuple[Tensor, float]:
        config = SaleConfig(Mass(threshold), min_length=0)
        output, (_, stats) = sale_attention(
            query,
            key,
            value,
            config,
            mask_mod=window_and_sinks,
            sink_logits=sink_logits,
            return_aux=AuxRequest(stats=True),
        )
        return output, stats.density.mean().item()

    at = torch.arange(args.length, device=device)
    distance = at[:, None] - at
    seen = (distance >= 0) & ((distance < args.window) | (at < 4))
    expected = dense(query, key, value, seen, sink_logits)
    error = (sparse(0.0)[0] - expected).abs().max().item()
    if not error < 1e-4:
        print(f"without a threshold the output is off by {error:.2g}", file=sys.stderr)
        return 1
    output, density = sparse(args.threshold)
    change = ((output - expected).norm() / expected.norm()).item()
    print(
        f"{args.length} tokens, window of {args.window} and 4 first tokens on {device}: density {density:.3f} of what "
        f"the mask shows, output changed by {change:.4f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
