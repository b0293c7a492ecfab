# SPDX-License-Identifier: BSD-3-Clause
"""Neighborhood attention on an image: every pixel attends to a window around it, and there to what matters.

Checks itself: without a threshold the output is that of dense attention under the same neighborhood. Exits 1 if not.

    python examples/neighborhood_2d.py --height 48 --width 64 --window 13 --dilation 2
"""

import argparse
import sys

import torch
from torch import Tensor

from sale_flex import AuxRequest, Mass, SaleConfig, mods, sale_attention
from sale_flex.testing import Inputs, Shape, assert_attention_close, dense_attention, random_inputs


def image(height: int, width: int, device: str) -> Inputs:
    """Queries, keys and values of an image in which regions of 16 x 16 pixels have something in common."""
    shape = Shape(height * width, height * width, heads=4, kv_heads=4, head_dim=32)
    query, key, value = random_inputs(shape, device=device)
    pixel = torch.arange(height * width, device=device)
    region = pixel // width // 16 * (width // 16 + 1) + pixel % width // 16
    common = torch.randn(int(region.max()) + 1, 32, generator=torch.Generator().manual_seed(1)).to(device)
    return Inputs(query + common[region], key + common[region], value)


def neighbours(length: int, window: int, dilation: int, device: str) -> Tensor:
    """Which positions of an axis each one sees: the `window` nearest that are multiples of `dilation` away."""
    at = torch.arange(length, device=device)
    group, place = at % dilation, at // dilation
    size = (length - group + dilation - 1) // dilation
    first = (place - window // 2).clamp_min(0).minimum(size - window)
    near = (place >= first[:, None]) & (place < first[:, None] + window)
    return near & (group == group[:, None])


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    """Print one line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--height", type=int, default=32, help="pixels")
    parser.add_argument("--width", type=int, default=48, help="pixels")
    parser.add_argument("--window", type=int, default=13, help="pixels along each axis")
    parser.add_argument("--dilation", type=int, default=1, help="pixels from one neighbour to the next")
    parser.add_argument("--threshold", type=float, default=0.01, help="share of a row's probability")
    args = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    query, key, value = image(args.height, args.width, device)
    mask_mod = mods.neighborhood((args.height, args.width), args.window, args.dilation)

    def sparse(threshold: float) -> tuple[Tensor, float]:
        config = SaleConfig(Mass(threshold), min_length=0, sink_tokens=0, local_tokens=1)
        output, (_, stats) = sale_attention(
            query, key, value, config, mask_mod=mask_mod, is_causal=False, return_aux=AuxRequest(stats=True)
        )
        return output, stats.density.mean().item()

    rows, columns = (neighbours(n, args.window, args.dilation, device) for n in (args.height, args.width))
    seen = (rows[:, None, :, None] & columns[None, :, None, :]).reshape(args.height * args.width, -1)
    try:
        assert_attention_close(sparse(0.0)[0], query, key, value, seen[None, None])
    except AssertionError as error:
        print(f"without a threshold: {error}", file=sys.stderr)
        return 1
    output, density = sparse(args.threshold)
    expected = dense_attention(query, key, value, seen[None, None])
    change = ((output - expected).norm() / expected.norm()).item()
    print(
        f"{args.height} x {args.width} pixels, window {args.window}, dilation {args.dilation} on {device}: density "
        f"{density:.3f} of what the neighborhood shows, output changed by {change:.4f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
