# SPDX-License-Identifier: BSD-3-Clause
"""Chunked attention, as Llama 4 has it: a token sees the tokens before it in its own chunk of the sequence."""

import torch
from torch import Tensor

from sale_flex.mods import MaskMod, with_key_range
from sale_flex.mods.held import held
from sale_flex.mods.placed import placed_mask


def chunked(chunk: int, first: Tensor, q_offset: int | Tensor = 0) -> MaskMod:
    """A row sees the keys from the start of its chunk up to its own position.

    Args:
        chunk: Tokens of a chunk.
        first: int32 ``[B]``, or ``[1]`` for all batch rows: key index of the token that chunks are counted from; below
            0 if it was handed in before.
        q_offset: Key index of query row 0, an int or a 0-d integer tensor.

    Raises:
        ValueError: `chunk` is less than 1.
    """
    if chunk < 1:
        raise ValueError(f"attention_chunk_size must be an int of at least 1, got {chunk}.")
    first = held(first.to(torch.int32).contiguous())

    if first.shape[0] == 1:

        def chunk_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return (kv_idx <= q_idx) & ((kv_idx - first[0]) // chunk == (q_idx - first[0]) // chunk)

        def key_range(b: Tensor, h: Tensor, first_q: Tensor, last_q: Tensor) -> tuple[Tensor, Tensor]:
            return first[0] + (first_q - first[0]) // chunk * chunk, last_q

        return placed_mask(with_key_range(chunk_mask, key_range), q_offset)

    def rows_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx <= q_idx) & ((kv_idx - first[b]) // chunk == (q_idx - first[b]) // chunk)

    def rows_range(b: Tensor, h: Tensor, first_q: Tensor, last_q: Tensor) -> tuple[Tensor, Tensor]:
        return first[b] + (first_q - first[b]) // chunk * chunk, last_q

    return placed_mask(with_key_range(rows_mask, rows_range), q_offset)
