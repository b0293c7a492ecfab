# SPDX-License-Identifier: BSD-3-Clause
"""Where the queries stand and which keys are valid, as one small tensor that every stage reads."""

import torch
from torch import Tensor


def query_bounds(query: Tensor, key: Tensor, kv_range: Tensor | None, q_offset: Tensor | None, offset: int) -> Tensor:
    """Check and gather the positions of a call.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``.
        kv_range: int ``[B, 2]`` (first and one-past-last valid key), or None for all keys.
        q_offset: int tensor, 0-d or ``[B]``, the key index of the first query, or None to take `offset`.
        offset: The same as an int.

    Returns:
        int32 ``[B, 3]`` = (q_offset, start, end).

    Raises:
        ValueError: On a CPU, a range or an offset outside the keys. On an accelerator, where reading a value would
            stop the host, the same rule is a device-side assertion.
    """
    batch, q_len, kv_len = query.shape[0], query.shape[2], key.shape[2]
    bounds = torch.empty(batch, 3, dtype=torch.int32, device=query.device)
    if q_offset is None:
        bounds[:, 0].fill_(offset)
    else:
        bounds[:, 0] = q_offset
        _check(
            ((q_offset >= 0) & (q_offset + q_len <= kv_len)).all(),
            "q_offset must place all queries at keys, 0 <= q_offset and q_offset + query.shape[2] <= key.shape[2] = "
            f"{kv_len}",
            q_offset,
        )
    if kv_range is None:
        bounds[:, 1].fill_(0)
        bounds[:, 2].fill_(kv_len)
    else:
        bounds[:, 1:] = kv_range
        start, end = kv_range.unbind(1)
        _check(
            ((start >= 0) & (start <= end) & (end <= kv_len)).all(),
            f"kv_range must hold (first, one past last) valid key with 0 <= first <= last <= key.shape[2] = {kv_len}",
            kv_range,
        )
    return bounds


def _check(holds: Tensor, rule: str, values: Tensor) -> None:
    if holds.device.type == "cpu":
        if not holds:
            raise ValueError(f"{rule}; got {values.tolist()}.")
    else:
        torch._assert_async(holds, f"{rule}.")
