# SPDX-License-Identifier: BSD-3-Clause
"""Checks of what mods are made from. None reads a value of a tensor."""

import torch
from torch import Tensor

from sale_flex.mods.held import held


def checked_count(name: str, value: object) -> int:
    """`value`, if it is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int of at least 1, got {type(value).__name__}.")
    if value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value}.")
    return value


def checked_offset(q_offset: object) -> int | Tensor:
    """`q_offset` as an int, or an int32 tensor ``[]`` or ``[B]``."""
    if isinstance(q_offset, Tensor):
        if q_offset.dim() > 1:
            raise ValueError(
                "q_offset must be an int, or an integer tensor [] or [batch], got shape "
                f"{list(q_offset.shape)}; drop dimensions with squeeze()."
            )
        return checked_indices("q_offset", q_offset)
    if isinstance(q_offset, bool) or not isinstance(q_offset, int):
        raise TypeError(f"q_offset must be an int, or an integer tensor [] or [batch], got {type(q_offset).__name__}.")
    return q_offset


def checked_indices(name: str, tensor: Tensor) -> Tensor:
    """An integer tensor as contiguous int32: int32 itself if it is that already, so that changes in place are seen."""
    check_integer(name, tensor)
    return held(tensor.to(torch.int32).contiguous())


def check_integer(name: str, tensor: object) -> None:
    """Raise TypeError unless it is a tensor of integers."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be an integer tensor, got {type(tensor).__name__}; make one with torch.tensor().")
    if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"{name} must be an integer tensor, got dtype {tensor.dtype}; convert it with {name}.int().")


def checked_table(name: str, table: object, dims: str) -> Tensor:
    """A floating-point tensor with the dimensions that `dims` names, such as "heads, distances", as float32."""
    if not isinstance(table, Tensor):
        raise TypeError(f"{name} must be a floating-point tensor [{dims}], got {type(table).__name__}.")
    if not table.is_floating_point():
        raise TypeError(
            f"{name} must be a floating-point tensor, got dtype {table.dtype}; convert it with {name}.float()."
        )
    if table.dim() != dims.count(",") + 1 or table.numel() == 0:
        raise ValueError(f"{name} must be a tensor [{dims}], not empty, got shape {list(table.shape)}.")
    for size in table.shape:
        # Heads and columns do not change. A length that torch.compile(dynamic=True) took for a symbol is settled here:
        # Inductor cannot lower flex_attention with symbols in a mod.
        len(range(size))
    return held(table.to(torch.float32).contiguous())
