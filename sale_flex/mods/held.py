# SPDX-License-Identifier: BSD-3-Clause
"""Tensors for a mod to capture, such that compiled flex_attention can read them on a CPU too.

Inductor's C++ template for flex_attention has two limits (torch 2.13). It raises "No choices exist for backend" for a
captured tensor that is still to be computed where it is read, as torch.compile leaves most; the result of an opaque op
is not. And it confuses the names of symbols, which sizes become once they change: so a table gets one length for all.
"""

import torch
from torch import Tensor

TABLE_LENGTH = 2**20
"""Length of a table on a CPU that needs no more: 4 MiB."""


def held(tensor: Tensor) -> Tensor:
    """`tensor`, computed; itself outside torch.compile."""
    if not torch.compiler.is_compiling() or tensor.requires_grad:
        return tensor
    return _held(tensor, 0)


def held_table(tensor: Tensor) -> Tensor:
    """The numbers of `tensor` in a row, computed; on a CPU followed by zeros up to `TABLE_LENGTH`."""
    flat = tensor.flatten()
    padded = flat.device.type == "cpu" and flat.numel() <= TABLE_LENGTH
    if not padded:
        return held(flat)
    table = _held(flat, TABLE_LENGTH)
    mark_static(table)
    return table


def mark_static(captured: Tensor) -> None:
    """Keep torch.compile(dynamic=True) from making symbols of a captured tensor's sizes."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static(captured)


@torch.library.custom_op("sale_flex::held", mutates_args=())
def _held(tensor: Tensor, length: int) -> Tensor:
    """A contiguous copy; of a tensor with one dimension with zeros up to `length`, if that is not 0."""
    if length == 0:
        return tensor.clone(memory_format=torch.contiguous_format)
    return torch.nn.functional.pad(tensor, (0, length - tensor.numel()))


@_held.register_fake
def _fake_held(tensor: Tensor, length: int) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format) if length == 0 else tensor.new_empty(length)
