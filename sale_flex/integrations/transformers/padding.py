# SPDX-License-Identifier: BSD-3-Clause
"""Which tokens of every batch row are valid: transformers' 2-D attention mask as first and one-past-last position."""

from typing import NamedTuple

import torch
from torch import Tensor

from sale_flex.ops.define import op


class Padding(NamedTuple):
    """The padding of a batch."""

    valid: Tensor
    """int32 ``[B, 2]``: first and one-past-last valid position; (0, 0) of a row without any."""
    first_valid: int | None
    """The largest first valid position of a row; None if values could not be read."""
    holes: bool
    """Whether some padding stands between valid tokens."""
    ranges: tuple[tuple[int, int], ...] | None = None
    """The positions in `valid`, if they could be read."""


def padding_of(attention_mask: Tensor) -> Padding | None:
    """The padding that a mask tells of, None for none.

    Reads values, in one go, where that is possible. Where it is not, in a compiled program or in the capture of a CUDA
    graph, there may be padding, but no hole: the program checks that when it runs.

    Args:
        attention_mask: bool ``[B, S]``, True for valid tokens.
    """
    readable = values_are_readable(attention_mask.device)
    valid = valid_keys(attention_mask, not readable)
    if not readable:
        return Padding(valid, None, False)
    start, end = valid.unbind(1)
    holes = (end - start) != attention_mask.sum(1)
    *flat, holed = torch.cat([valid.flatten(), holes.any()[None]]).tolist()
    starts, ends = flat[::2], flat[1::2]
    first = max(starts)
    if first == 0 and min(ends) == attention_mask.shape[1] and not holed:
        return None
    return Padding(valid, first, bool(holed), tuple(zip(starts, ends)))


def values_are_readable(device: torch.device) -> bool:
    """Whether a value on `device` may be read here: not in a compiled program, not while a CUDA graph is captured."""
    if torch.compiler.is_compiling():
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _valid_keys(attention_mask: Tensor, check: bool) -> Tensor:
    length = attention_mask.shape[1]
    ones = attention_mask.int()
    some = attention_mask.any(1)
    start = ones.argmax(1)
    end = torch.where(some, length - ones.flip(1).argmax(1), 0)
    if check:
        whole = (end - start == ones.sum(1)).all()
        rule = (
            "attention_mask must not have padding between valid tokens under torch.compile or in a CUDA graph; "
            "run such batches uncompiled, or pack their sequences and pass position_ids"
        )
        if whole.device.type == "cpu":
            if not whole:
                raise ValueError(f"{rule}.")
        else:
            torch._assert_async(whole, f"{rule}.")
    return torch.stack([start, end], 1).int()


@op(_valid_keys)
def valid_keys(attention_mask: Tensor, check: bool) -> Tensor:
    """First and one past the last valid key of every batch row, int32 ``[B, 2]``."""
    return attention_mask.new_empty(attention_mask.shape[0], 2, dtype=torch.int32)
