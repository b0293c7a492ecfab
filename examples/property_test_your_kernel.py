# SPDX-License-Identifier: BSD-3-Clause
"""Test an attention kernel that is not ours with `sale_flex.testing`, and find the bug in it.

The kernel is a blockwise attention with an online softmax, of the kind one writes first on the way to a fused one. One
of its two versions maps query heads to KV heads as if the number of query heads were a power of two, so tests with the
usual numbers of heads pass. Hypothesis needs a few examples to find it, and reports the smallest call that shows it.

Run: ``python examples/property_test_your_kernel.py`` (needs ``pip install 'sale-flex[test]'``). Exits with 0 if the bug
was found and the corrected kernel has none.
"""

import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from hypothesis import given, settings
from torch import Tensor

from sale_flex.testing import Shape, assert_attention_close, causal_mask, random_inputs
from sale_flex.testing.strategies import seeds, shapes

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]

TILE = 32


def blockwise_attention(query: Tensor, key: Tensor, value: Tensor, kv_head_of: list[int]) -> Tensor:
    """Causal attention, a tile of keys at a time, in float32.

    Args:
        query: ``[B, Hq, Sq, D]``; the last row stands at the last key.
        key: ``[B, Hkv, Skv, D]``.
        value: ``[B, Hkv, Skv, D]``.
        kv_head_of: The KV head of every query head.

    Returns:
        ``[B, Hq, Sq, D]`` in the query's dtype.
    """
    rows, keys = query.shape[2], key.shape[2]
    position = torch.arange(rows)[:, None] + keys - rows
    peak = torch.full((*query.shape[:3], 1), -torch.inf)
    total = torch.zeros_like(peak)
    output = torch.zeros_like(query, dtype=torch.float32)
    for first in range(0, keys, TILE):
        tile = slice(first, min(first + TILE, keys))
        logits = query.float() @ key[:, kv_head_of, tile].float().transpose(-1, -2) * query.shape[3] ** -0.5
        logits = logits.masked_fill(torch.arange(tile.start, tile.stop) > position, -torch.inf)
        new_peak = torch.maximum(peak, logits.amax(-1, keepdim=True))
        decay = (peak - new_peak).exp()
        weights = (logits - new_peak).exp()
        total = total * decay + weights.sum(-1, keepdim=True)
        output = output * decay + weights @ value[:, kv_head_of, tile].float()
        peak = new_peak
    return (output / total).to(query.dtype)


def kernel_with_a_bug(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Rounds the number of query heads up to a power of two, as the grid of a kernel may well be."""
    heads, kv_heads = query.shape[1], key.shape[1]
    rounded = 1 << (heads - 1).bit_length()
    return blockwise_attention(query, key, value, [head * kv_heads // rounded for head in range(heads)])


def corrected_kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Divides by the size of a group."""
    heads, kv_heads = query.shape[1], key.shape[1]
    return blockwise_attention(query, key, value, [head // (heads // kv_heads) for head in range(heads)])


def smallest_failure(kernel: Kernel) -> tuple[Shape | None, str]:
    """Run the property test of a kernel.

    Returns:
        The smallest call that fails and what is wrong with it; or None and how many calls passed.
    """
    tried: list[Shape] = []

    # No database and no randomness: an example should print the same on every machine.
    @settings(deadline=None, derandomize=True, database=None)
    @given(shapes(padded=False, dtypes=(torch.float32, torch.bfloat16)), seeds())
    def output_is_dense_attention(shape: Shape, seed: int) -> None:
        shape = replace(shape, q_offset=None)  # this kernel knows the bottom-right alignment alone
        tried.append(shape)
        query, key, value = random_inputs(shape, seed)
        assert_attention_close(kernel(query, key, value), query, key, value, causal_mask(shape))

    try:
        output_is_dense_attention()
    except AssertionError as error:
        return tried[-1], str(error)  # what Hypothesis runs last is the smallest
    return None, f"{len(tried)} calls of all shapes are right"


def main() -> int:
    """Test both versions and say what was found."""
    bug, what = smallest_failure(kernel_with_a_bug)
    print(f"kernel with a bug: {'NOT FOUND, ' + what if bug is None else f'found at {bug}: {what}'}")
    left, what = smallest_failure(corrected_kernel)
    print(f"corrected kernel: {what if left is None else f'STILL WRONG at {left}: {what}'}")
    return 0 if bug is not None and left is None else 1


if __name__ == "__main__":
    sys.exit(main())
