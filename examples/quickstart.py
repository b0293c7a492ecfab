# SPDX-License-Identifier: BSD-3-Clause
"""Sparse against dense attention on one layer's worth of structured tensors: density, error, seconds.

Runs anywhere; a GPU makes it worth while. It exits 1 when the sparse output differs from exact attention on the blocks
that the mask says are kept.

    python examples/quickstart.py --length 8192
"""

import argparse
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import sale_flex
from sale_flex import AuxRequest
from sale_flex.testing import Shape, assert_attention_close, block_map, causal_mask, expand_blocks, structured_inputs


def seconds(run: Callable[[], object]) -> float:
    """Time of a second call: the first one compiles."""
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    """Print one line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int, default=4096, help="tokens")
    parser.add_argument("--threshold", type=float, default=0.01, help="share of a row's probability")
    args = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shape = Shape(args.length, args.length, heads=8, kv_heads=2, head_dim=64, dtype=dtype)
    query, key, value = structured_inputs(shape, device=device)
    # By default what is too short to gain time is dense; here the sparse path is what is to be seen.
    config = sale_flex.SaleConfig(sale_flex.Mass(args.threshold), min_length=1024)

    def dense() -> Tensor:
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    def sparse() -> Tensor:
        return sale_flex.sale_attention(query, key, value, config)

    output, (_, stats) = sale_flex.sale_attention(query, key, value, config, return_aux=AuxRequest(stats=True))
    if args.length <= 8192:  # the check builds whole score matrices
        mask = sale_flex.create_sale_block_mask(query, key, config)
        kept = expand_blocks(block_map(mask).kept, config.block_size, args.length, args.length)
        try:
            assert_attention_close(output, query, key, value, causal_mask(shape, device=device) & kept)
        except AssertionError as error:
            print(error, file=sys.stderr)
            return 1
    change = ((output - dense()).norm() / output.norm()).item()
    print(
        f"{args.length} tokens on {device}, {stats.describe()}: density {stats.density.mean():.3f}, output changed by "
        f"{change:.4f}, {seconds(sparse):.4f} s against {seconds(dense):.4f} s dense"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
