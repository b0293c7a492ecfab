# SPDX-License-Identifier: BSD-3-Clause
"""The score an element of a row must reach: exact sink-local softmax statistics (SALE section 3.2).

Entry point: `row_limits`. A program takes BLOCK_M query rows of one head, visits the sink keys and the local keys of
its rows in tiles, and keeps a running maximum and sum as flash attention does. Logits are those of the smoothed keys:
``q.k - q.mean``, one correction a row, so the keys are read as they are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import Grid, MaskSpec, ModLike, Near, Structure
from .masked_relative import masked_limits
from .quantize import CODE_ROWS


@triton.jit
def _accumulate(
    peak, total, query, key_ptr, stride_s, stride_d, offsets_n, stop, shift, scale, allowed,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Fold the logits of one tile of keys into the running maximum `peak` and sum `total`, and return both.

    Args:
        peak: Largest logit so far, float32 ``[BLOCK_M]``.
        total: Sum of exponentials so far, relative to `peak`, float32 ``[BLOCK_M]``.
        query: Rows ``[BLOCK_M, BLOCK_D]``, the keys' dtype.
        key_ptr: Keys of the KV head ``[Skv, D]``.
        stride_s: From key to key.
        stride_d: From channel to channel.
        offsets_n: Keys of the tile, int32 ``[BLOCK_N]``.
        stop: One past the last key to read.
        shift: Rows times the smoothing mean, float32 ``[BLOCK_M]``.
        scale: Softmax scale.
        allowed: Which keys count for each row, int1 ``[BLOCK_M, BLOCK_N]``.
        D: Channels.
        BLOCK_D: Channels, rounded up to a power of two.
    """
    offsets_d = tl.arange(0, BLOCK_D)
    mask = (offsets_d < D)[:, None] & (offsets_n < stop)[None, :]
    pointers = key_ptr + offsets_n.to(tl.int64)[None, :] * stride_s + offsets_d[:, None] * stride_d
    key = tl.load(pointers, mask=mask, other=0.0)  # [BLOCK_D, BLOCK_N]
    logits = (tl.dot(query, key, input_precision="ieee") - shift[:, None]) * scale
    logits = tl.where(allowed, logits, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(logits, axis=1))
    # A row that has seen nothing yet has the peak -inf, and -inf - -inf is NaN.
    safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    total = total * tl.exp(peak - safe) + tl.sum(tl.exp(logits - safe[:, None]), axis=1)
    return new_peak, total


@triton.jit
def _row_limits_kernel(
    query_ptr, stride_qb, stride_qh, stride_qs, stride_qd,
    key_ptr, stride_kb, stride_kh, stride_ks, stride_kd,
    mean_ptr, query_scale_ptr, bounds_ptr, threshold_ptr, limit_ptr,
    scale, q_len, padded_rows, sink_tokens, local_tokens,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Limits of BLOCK_M rows of one head, in units of (code product x key scale).

    Args:
        query_ptr: Queries ``[B, Hq, Sq, D]``.
        stride_qb: Queries: from batch row to batch row.
        stride_qh: Queries: from head to head.
        stride_qs: Queries: from row to row.
        stride_qd: Queries: from channel to channel.
        key_ptr: Keys ``[B, Hkv, Skv, D]``, the queries' dtype.
        stride_kb: Keys: from batch row to batch row.
        stride_kh: Keys: from head to head.
        stride_ks: Keys: from key to key.
        stride_kd: Keys: from channel to channel.
        mean_ptr: Smoothing mean, float32 ``[B, Hkv, D]``.
        query_scale_ptr: Scales of the queries' codes, float32 ``[B, Hq, Sq]``.
        bounds_ptr: int32 ``[B, 3]`` = (q_offset, start, end).
        threshold_ptr: Relative attention score, float32 ``[Hq]``.
        limit_ptr: Result, float32 ``[B, Hq, R]``; +inf for rows that are padding.
        scale: Softmax scale.
        q_len: Sq.
        padded_rows: R: query rows, padded.
        sink_tokens: First valid keys in the statistics.
        local_tokens: Last keys up to a row's position in the statistics.
        HEADS: Hq.
        KV_HEADS: Hkv.
        D: Channels.
        BLOCK_D: Channels, rounded up to a power of two.
        BLOCK_M: Query rows a program.
        BLOCK_N: Keys a step.
    """
    bh = tl.program_id(1).to(tl.int64)
    batch = bh // HEADS
    head = bh % HEADS
    kv_head = head // (HEADS // KV_HEADS)
    offset = tl.load(bounds_ptr + batch * 3)
    start = tl.load(bounds_ptr + batch * 3 + 1)
    end = tl.load(bounds_ptr + batch * 3 + 2)

    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    position = offset + rows
    real = (rows < q_len) & (position >= start) & (position < end)
    offsets_d = tl.arange(0, BLOCK_D)
    query_ptr += batch * stride_qb + head * stride_qh
    mask = (rows < q_len)[:, None] & (offsets_d < D)[None, :]
    pointers = query_ptr + rows.to(tl.int64)[:, None] * stride_qs + offsets_d[None, :] * stride_qd
    query = tl.load(pointers, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_D]
    mean = tl.load(mean_ptr + (batch * KV_HEADS + kv_head) * D + offsets_d, mask=offsets_d < D, other=0.0)
    shift = tl.sum(query.to(tl.float32) * mean[None, :], axis=1)
    key_ptr += batch * stride_kb + kv_head * stride_kh

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sink_end = tl.minimum(start + sink_tokens, end)
    for first in range(start, sink_end, BLOCK_N):
        at = first + tl.arange(0, BLOCK_N)
        allowed = (at < sink_end)[None, :] & (at[None, :] <= position[:, None])
        peak, total = _accumulate(
            peak, total, query, key_ptr, stride_ks, stride_kd, at, sink_end, shift, scale, allowed, D, BLOCK_D
        )
    # Keys that are both sink and local were counted above.
    low = tl.maximum(offset + tl.program_id(0) * BLOCK_M - local_tokens + 1, start + sink_tokens)
    high = tl.minimum(offset + tl.minimum((tl.program_id(0) + 1) * BLOCK_M, q_len), end)
    for first in range(low, high, BLOCK_N):
        at = first + tl.arange(0, BLOCK_N)
        near = (at[None, :] <= position[:, None]) & (at[None, :] > position[:, None] - local_tokens)
        allowed = near & (at < high)[None, :]
        peak, total = _accumulate(
            peak, total, query, key_ptr, stride_ks, stride_kd, at, high, shift, scale, allowed, D, BLOCK_D
        )

    tau = tl.load(threshold_ptr + head)
    query_scale = tl.load(query_scale_ptr + bh * q_len + rows, mask=rows < q_len, other=1.0)
    limit = (peak + tl.log(total) + tl.log(tau)) / (scale * query_scale)
    tl.store(limit_ptr + bh * padded_rows + rows, tl.where(real, limit, float("inf")), mask=rows < padded_rows)


def row_limits(
    query: Tensor,
    query_scale: Tensor,
    key: Tensor,
    mean: Tensor,
    spec: MaskSpec,
    structure: Structure | None,
    score: ModLike,
    threshold: Tensor,
    scale: float,
    grid: Grid,
    near: Near,
) -> tuple[Tensor, Tensor]:
    """What row i's scores must reach to keep a block: the log-sum-exp over its sink and local keys, plus ln threshold.

    Args:
        query: ``[B, Hq, Sq, D]``, any strides.
        query_scale: float32 ``[B, Hq, Sq]`` from `quantize_rows`.
        key: ``[B, Hkv, Skv, D]``, any strides, the query's dtype.
        mean: float32 ``[B, Hkv, D]``, the keys' smoothing mean.
        spec: Who sees whom; its mask is the mask_mod as jit function and what it reads, or None.
        structure: From `block_structure` and `candidate_blocks`; None in plain causal attention.
        score: score_mod as jit function and what it reads, or None.
        threshold: float32 ``[Hq]``, relative attention score.
        scale: Softmax scale.
        grid: Lengths and blocks.
        near: Sink keys, from a row's first one on, and local keys that are in the statistics.

    Returns:
        The limit, float32 ``[B, Hq, ceil(Sq / 128) * 128]``, +inf for rows that see nothing: what
        ``max_j codes_i . codes_j * key_scale`` must reach, or with a score_mod a logit. And of the same shape `scale`
        times row times `mean`, ``[B, Hq, 0]`` without a score_mod.
    """
    if structure is not None:
        return masked_limits(query, query_scale, key, mean, spec, structure, score, threshold, scale, grid, near)
    batch, heads, q_len, dim = query.shape
    padded = triton.cdiv(q_len, CODE_ROWS) * CODE_ROWS
    limit = query.new_empty(batch, heads, padded, dtype=torch.float32)
    shift = query.new_empty(batch, heads, 0, dtype=torch.float32)
    block_d = triton.next_power_of_2(dim)
    # Tiles of at most 16 KiB of queries and 8 KiB of keys fit every supported GPU's shared memory. The loops are short:
    # a pipeline would cost more than it hides.
    block_m = max(16, min(64, 16384 // (block_d * query.element_size())))
    _row_limits_kernel[(padded // block_m, batch * heads)](
        query, *query.stride(), key, *key.stride(), mean, query_scale, spec.bounds, threshold, limit,
        scale, q_len, padded, near.sink_tokens, near.local_tokens,
        HEADS=heads, KV_HEADS=key.shape[1], D=dim, BLOCK_D=block_d,
        BLOCK_M=block_m, BLOCK_N=max(16, block_m // 2), num_warps=4, num_stages=1,
    )  # fmt: skip
    return limit, shift
