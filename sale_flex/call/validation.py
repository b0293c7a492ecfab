# SPDX-License-Identifier: BSD-3-Clause
"""What bad input gets: the argument, the rule, what came, and what to do about it. Reads no value of a tensor."""

import math

import torch
from torch import Tensor

from sale_flex.config import SaleConfig

HEAD_DIMS = (32, 64, 80, 96, 128, 192, 256)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def settled(scale: float | None) -> float | None:
    """`scale` as a constant of a compiled program; torch.compile(dynamic=True) makes a symbol of a module's number."""
    if torch.compiler.is_compiling() and isinstance(scale, float):
        return float.fromhex(scale.hex())
    return scale


def check_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    config: SaleConfig,
    q_offset: int | Tensor | None,
    kv_range: Tensor | None,
    scale: float | None,
) -> None:
    """Raise TypeError or ValueError for the first argument that breaks its rule."""
    if not _plainly_good(query, key, value):
        _check_tensors(query, key, value)
    if not isinstance(config, SaleConfig):
        raise TypeError(f"config must be a sale_flex.SaleConfig, got {type(config).__name__}.")
    _check_threshold(config.rule.threshold, query)
    _check_positions(query, key, q_offset, kv_range)
    if scale is not None:
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise TypeError(f"scale must be a float or None (head_dim ** -0.5), got {type(scale).__name__}.")
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale must be a finite number above 0, or None (head_dim ** -0.5), got {scale!r}.")


def _plainly_good(query: Tensor, key: Tensor, value: Tensor | None) -> bool:
    """Whether the tensors keep all rules of `_check_tensors`, in a few comparisons: short calls notice the others."""
    if type(query) is not Tensor or type(key) is not Tensor or (value is not None and type(value) is not Tensor):
        return False
    shape, key_shape, dtype, device = query.shape, key.shape, query.dtype, query.device
    if len(shape) != 4 or len(key_shape) != 4 or key.dtype != dtype or key.device != device or dtype not in DTYPES:
        return False
    if value is not None and (value.shape != key_shape or value.dtype != dtype or value.device != device):
        return False
    batch, heads, q_len, dim = shape
    key_batch, kv_heads, kv_len, key_dim = key_shape
    return (
        dim in HEAD_DIMS
        and dim == key_dim
        and batch == key_batch > 0
        and min(heads, q_len, kv_heads, kv_len) > 0
        and heads % kv_heads == 0
    )


def _check_tensors(query: Tensor, key: Tensor, value: Tensor | None) -> None:
    named = {"query": query, "key": key} | ({} if value is None else {"value": value})
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions [batch, heads, length, head_dim], got shape {list(tensor.shape)}; "
                "add the batch dimension with unsqueeze(0), or move heads before length with transpose(1, 2)."
            )
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}; convert it with {name}.to()."
            )
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} must have the query's dtype {query.dtype}, got {tensor.dtype}.")
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on the query's device {query.device}, got {tensor.device}.")
        if 0 in tensor.shape[:3]:
            raise ValueError(
                f"{name} must not be empty, got shape {list(tensor.shape)}; skip attention for an empty sequence."
            )
        if tensor.shape[0] != query.shape[0]:
            raise ValueError(
                f"{name} must have the query's batch size {query.shape[0]}, got shape {list(tensor.shape)}."
            )
        if tensor.shape[3] != query.shape[3]:
            raise ValueError(f"{name} must have the query's head_dim {query.shape[3]}, got {tensor.shape[3]}.")
    if query.shape[3] not in HEAD_DIMS:
        raise ValueError(
            f"query must have a head_dim (last dimension) of {HEAD_DIMS}, got {query.shape[3]}; pad query, key and "
            "value with zeros and pass the scale of the unpadded head_dim."
        )
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            "query must have a number of heads that is a multiple of the key's, got "
            f"{query.shape[1]} query heads and {key.shape[1]} key heads."
        )
    if value is not None and value.shape != key.shape:
        raise ValueError(f"value must have the key's shape {list(key.shape)}, got {list(value.shape)}.")


def _check_threshold(threshold: float | Tensor, query: Tensor) -> None:
    if not isinstance(threshold, Tensor):
        return
    if threshold.shape[0] != query.shape[1]:
        raise ValueError(
            f"config.rule.threshold must be a float or have shape [{query.shape[1]}], one per query head, got "
            f"{list(threshold.shape)}."
        )
    if threshold.device != query.device:
        raise ValueError(
            f"config.rule.threshold must be on the query's device {query.device}, got {threshold.device}; move it "
            "once, when the rule is made."
        )


def _check_positions(query: Tensor, key: Tensor, q_offset: int | Tensor | None, kv_range: Tensor | None) -> None:
    q_len, kv_len = query.shape[2], key.shape[2]
    if q_offset is None:
        if q_len > kv_len:
            raise ValueError(
                f"query must not be longer than key ({q_len} > {kv_len}) when q_offset is left out: its last row "
                "stands at the last key."
            )
    elif isinstance(q_offset, Tensor):
        shapes = ((), (query.shape[0],))
        if tuple(q_offset.shape) not in shapes or q_offset.is_floating_point() or q_offset.dtype == torch.bool:
            raise ValueError(
                f"q_offset must be an int or an integer tensor of shape [] or [{query.shape[0]}], one per batch row, "
                f"got shape {list(q_offset.shape)} and dtype {q_offset.dtype}."
            )
        if q_offset.dim() and q_offset.device != query.device:
            raise ValueError(
                f"q_offset must be on the query's device {query.device} if there is one per batch row, got "
                f"{q_offset.device}."
            )
    elif isinstance(q_offset, bool) or not isinstance(q_offset, (int, torch.SymInt)):
        raise TypeError(f"q_offset must be an int or an integer tensor, got {type(q_offset).__name__}.")
    elif q_offset < 0 or q_offset + q_len > kv_len:
        raise ValueError(
            "q_offset must place all queries at keys, 0 <= q_offset and q_offset + query.shape[2] <= key.shape[2]; got "
            f"q_offset {q_offset} with {q_len} queries and {kv_len} keys."
        )
    if kv_range is None:
        return
    if not isinstance(kv_range, Tensor):
        raise TypeError(f"kv_range must be an integer tensor of shape [batch, 2], got {type(kv_range).__name__}.")
    if kv_range.shape != (query.shape[0], 2):
        raise ValueError(f"kv_range must have shape [{query.shape[0]}, 2], got {list(kv_range.shape)}.")
    if kv_range.is_floating_point() or kv_range.dtype == torch.bool:
        raise TypeError(f"kv_range must hold integers, got {kv_range.dtype}.")
    if kv_range.device != query.device:
        raise ValueError(f"kv_range must be on the query's device {query.device}, got {kv_range.device}.")
