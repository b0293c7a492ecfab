# SPDX-License-Identifier: BSD-3-Clause
"""Whether outputs are right, on sampled rows: nothing is timed before this has been asked.

Whole S x S scores of one head of 1M tokens would be 4 TB. What is held here are a few rows of one KV head at a time,
and which blocks a row keeps is read from the block mask's index lists.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention

from sale_flex.bench.inputs import Inputs
from sale_flex.testing import decode_list, unit_roundoff

ROWS = 16
"""Rows of every head that are compared."""


class WrongOutput(Exception):
    """An output differs from exact attention by more than its precision explains."""


class Errors(NamedTuple):
    """Relative errors of the sampled rows: norm of the difference over norm of what is expected."""

    kept: float
    """Against float32 attention over the blocks that the mask keeps."""
    usual: float
    """The same of `scaled_dot_product_attention` in the inputs' dtype: what rounding explains."""
    dense: float
    """Against float32 attention over everything: what the blocks that were dropped cost."""
    logit: float
    """Largest magnitude of a visible logit."""

    def check(self, what: str) -> Self:
        """These errors, or `WrongOutput` if they are more than the precision explains.

        Both compute one softmax in the inputs' dtype and accumulate in float32, in another order: up to twice the error
        of torch's own kernel is usual. To that comes what a running maximum may cost and torch's kernel may not pay, 16
        roundings of the largest logit in numerator and denominator each (see `attention_error_bound`).
        """
        if not self.kept <= 2 * self.usual + 32 * unit_roundoff(torch.float32) * self.logit:
            raise WrongOutput(
                f"the output of {what} is wrong, nothing was timed: on {ROWS} sampled rows of every head it is "
                f"{self.kept:.2e} away from float32 attention over the kept blocks, and scaled_dot_product_attention "
                f"on the same is {self.usual:.2e} away"
            )
        return self


def sampled_rows(length: int, device: torch.device) -> Tensor:
    """The rows that are compared, int64 ``[<= ROWS]``, from the first to the last."""
    return torch.linspace(0, length - 1, min(ROWS, length), device=device, dtype=torch.float64).long()


def errors(output: Tensor, inputs: Inputs, rows: Tensor, mask: BlockMask | None, early: int = 0) -> Errors:
    """Compare rows of an output.

    Args:
        output: Those rows alone, ``[B, Hq, R, D]``.
        inputs: What it was computed from.
        rows: int64 ``[R]``.
        mask: The blocks it is computed on; None for dense attention.
        early: Rows before this one are dense whatever the mask says.
    """
    sums = torch.zeros(5, dtype=torch.float64, device=output.device)
    largest = torch.zeros((), device=output.device)
    for batch, heads, kv_head in _groups(inputs):
        query = inputs.query[batch, heads][:, rows]  # [group, R, D]
        key, value = inputs.key[batch, kv_head], inputs.value[batch, kv_head]  # [S, D]
        causal = torch.arange(key.shape[0], device=rows.device) <= rows[:, None]  # [R, S]
        seen = causal.expand(len(query), -1, -1)
        if mask is not None:
            seen = seen & (kept_keys(mask, batch, heads, rows, key.shape[0]) | (rows < early)[:, None])
        logits = query.float() @ key.float().T * inputs.scale
        largest = torch.maximum(largest, logits.abs().masked_fill_(~causal, 0.0).max())
        dense = _attend(logits, causal, value)
        kept = dense if mask is None else _attend(logits, seen, value)
        del logits
        usual = scaled_dot_product_attention(
            query.flatten(0, 1)[None, None],
            key[None, None],
            value[None, None],
            attn_mask=seen.flatten(0, 1)[None, None],
            scale=inputs.scale,
        ).view_as(query)
        got = output[batch, heads].float()
        pairs = ((got - kept), (usual.float() - kept), (got - dense), kept, dense)
        sums += torch.stack([pair.double().square().sum() for pair in pairs])
    wrong, rounding, lost, kept_size, dense_size = sums.sqrt().tolist()
    return Errors(wrong / kept_size, rounding / kept_size, lost / dense_size, largest.item())


def _groups(inputs: Inputs) -> Iterator[tuple[int, slice, int]]:
    """Batch row, query heads and KV head of every group."""
    group = inputs.query.shape[1] // inputs.key.shape[1]
    for batch in range(inputs.query.shape[0]):
        for kv_head in range(inputs.key.shape[1]):
            yield batch, slice(kv_head * group, (kv_head + 1) * group), kv_head


def _attend(logits: Tensor, seen: Tensor, value: Tensor) -> Tensor:
    return logits.masked_fill(~seen, -math.inf).softmax(-1) @ value.float()


def kept_keys(mask: BlockMask, batch: int, heads: slice, rows: Tensor, length: int) -> Tensor:
    """Which keys lie in a block that a row's query block keeps, bool ``[heads, R, length]``."""
    block_q, block_k = mask.BLOCK_SIZE
    at = rows // block_q
    blocks = math.ceil(length / block_k)
    kept = decode_list(mask.kv_num_blocks[batch, heads][:, at], mask.kv_indices[batch, heads][:, at], blocks)
    if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
        numbers, indices = mask.full_kv_num_blocks[batch, heads][:, at], mask.full_kv_indices[batch, heads][:, at]
        kept = kept | decode_list(numbers, indices, blocks)
    return kept.repeat_interleave(block_k, -1)[..., :length]
