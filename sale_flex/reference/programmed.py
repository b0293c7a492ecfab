# SPDX-License-Identifier: BSD-3-Clause
"""Calls with a score_mod, a mask_mod, a block mask or without causality (docs/semantics.md, "Programmed calls").

Mods are called as they are, by torch.vmap over (b, h, q_idx, kv_idx), and everything is a whole S x S tensor. What
rows see decides all the rest: which blocks are visible, full, always kept, and which candidates a rule has to weigh.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

from sale_flex.reference.common import (
    Choice,
    KeepMap,
    block_any,
    block_max,
    key_mean,
    make_bounds,
    of_rule,
    quantize_rows,
    repeat_heads,
    rotate,
    rotation_width,
)
from sale_flex.reference.mass import (
    FRACTION,
    LOG2E,
    MassOptions,
    RowMasses,
    coded_logits,
    decide,
    exponentials,
    mass_options,
    pool_rows,
    pooled_logits,
)
from sale_flex.reference.moments import Moments, quantize_moments
from sale_flex.reference.relative import quantize_groups

Mod = Callable[..., Tensor]

STEP = math.log(2) / 8
"""How far a budget raises the cuts of a query block at a time, in nats."""

FLOOR = -100 * math.log(2)
"""Where the cut of threshold 0 is, below the total, when a budget starts to raise it, in nats."""

ABSENT = -1e38
"""The logit of a key whose own is not finite, in an exact part: it counts for nothing there, but the row sees a key."""


class Call(NamedTuple):
    """What a rule decides on."""

    query: Tensor
    """``[B, Hq, Sq, D]``."""
    key: Tensor
    """``[B, Hkv, Skv, D]``."""
    bounds: Tensor
    """int32 ``[B, 3]``."""
    mean: Tensor
    """float32 ``[B, Hkv, D]``: the smoothing mean."""
    seen: Tensor
    """bool ``[B, Hq, Sq, Skv]``: which key each row sees."""
    sink_local: Tensor
    """bool ``[B, Hq, Sq, Skv]``: sink and local keys of rows that see something."""
    candidate: Tensor
    """bool ``[B, Hq, nq, nk]``: visible blocks that are not kept anyway."""
    full: Tensor
    """bool ``[B, Hq, nq, nk]``: blocks in which every row sees every key."""
    score_mod: Mod | None
    scale: float
    dtype: torch.dtype
    """float32 or float64: the arithmetic of logits and weights."""


class RowWeights(NamedTuple):
    """How the softmax of pooled rows is spread over blocks, in natural logarithms."""

    weight: Tensor
    """``[B, Hq, np, nk]``: log of the sum of exponentials in a block; -inf where nothing is."""
    total: Tensor
    """``[B, Hq, np]``: the same over all blocks."""
    finite: Tensor
    """bool ``[B, Hq, np]``: whether the pooled row is; a row that does not exist is."""


def programmed_keep_map(
    query: Tensor,
    key: Tensor,
    config: Any,
    value: Tensor | None = None,
    *,
    score_mod: Mod | None = None,
    mask_mod: Mod | None = None,
    block_mask: Any = None,
    is_causal: bool = True,
    q_offset: int | Tensor | None = None,
    kv_range: Tensor | None = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.float32,
    budget: int | None = None,
) -> KeepMap:
    """Which blocks `config` (a `SaleConfig`) keeps under a call's mods.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``.
        config: The fields of `sale_flex.SaleConfig`; `min_length` must be a number here.
        value: ``[B, Hkv, Skv, D]``; visible blocks with a valid value that is not finite are kept.
        score_mod: As flex_attention takes it.
        mask_mod: Likewise.
        block_mask: A BlockMask of any block size: its lists, and its mask_mod besides.
        is_causal: Whether keys after a row's position are hidden.
        q_offset: Key index of the first query; by default ``Skv - Sq``.
        kv_range: int ``[B, 2]``, first and one-past-last valid key.
        scale: Softmax scale; by default ``D ** -0.5``.
        dtype: float32 or float64, the arithmetic of logits and weights.
        budget: Mass rule: most blocks that a query block may ask for by their masses; None for all.

    Returns:
        A `KeepMap` in which `visible` and `full`, too, have a map per head. `margin` is, for the mass rule, the largest
        ``W_rJ - (total_r + ln threshold)`` of the block's rows (with the raised cut, where there is a budget): 0 and
        more is a hit. For the relative rule it is the largest (score - limit). -inf where nothing can hit the block,
        +inf where no mass is asked.

    Raises:
        ValueError: `min_length` is None.
    """
    if config.min_length is None:
        raise ValueError("config.min_length must be a number of tokens, got None; resolve it first.")
    batch, heads, q_len, dim = query.shape
    kv_len = key.shape[2]
    block_q, block_k = config.block_size
    scale = dim**-0.5 if scale is None else scale
    bounds = make_bounds(batch, q_len, kv_len, q_offset, kv_range, query.device)
    seen = seen_elements(bounds, heads, q_len, kv_len, mask_mod, block_mask, is_causal)
    visible = block_any(seen, block_q, block_k)
    full = ~block_any(~seen, block_q, block_k)
    min_length = kv_len if 2 * q_len < block_q else config.min_length
    sink_local = near_elements(seen, bounds, is_causal, config.sink_tokens, config.local_tokens)
    early = early_elements(seen, min_length)
    always = visible & block_any(sink_local | early, block_q, block_k)
    candidate = visible & ~always
    mean = key_mean(key, bounds, config.smooth_tokens)
    call = Call(query, key, bounds, mean, seen, sink_local, candidate, full, score_mod, scale, dtype)
    choose = {"mass": partial(mass_choice, budget=budget), "relative": relative_choice}
    choice: Choice = of_rule(choose, config)(call, config)
    if value is not None:
        at = torch.arange(kv_len, device=key.device)
        valid = (at >= bounds[:, 1, None]) & (at < bounds[:, 2, None])
        bad = repeat_heads(~value.isfinite().all(-1) & valid[:, None], heads)  # [B, Hq, Skv]
        always = always | (visible & block_any(bad[:, :, None], 1, block_k))
    return KeepMap(
        kept=always | choice.hit,
        hit=choice.hit,
        always=always,
        visible=visible,
        full=full,
        margin=choice.margin,
        dropped=choice.dropped,
    )


def programmed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    *,
    bounds: Tensor,
    block_size: tuple[int, int],
    scale: float,
    score_mod: Mod | None = None,
    mask_mod: Mod | None = None,
    block_mask: Any = None,
    is_causal: bool = True,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention to the elements that rows see in kept blocks; differentiable in query, key and value.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``.
        value: ``[B, Hkv, Skv, Dv]``.
        kept: bool ``[B, Hq, nq, nk]``.
        bounds: int32 ``[B, 3]``.
        block_size: (query rows, keys) of a block.
        scale: Softmax scale.
        score_mod: As flex_attention takes it.
        mask_mod: Likewise.
        block_mask: A BlockMask, see `programmed_keep_map`.
        is_causal: Whether keys after a row's position are hidden.
        sink_logits: ``[Hq]``: one more logit for every row of a head, which takes probability and has no value.

    Returns:
        float64 ``[B, Hq, Sq, Dv]``, 0 where a row sees nothing in kept blocks; and float64 ``[B, Hq, Sq]``, the natural
        logarithm of the sum of exponentials of what it sees, without the sink; -inf for nothing.
    """
    heads, q_len, kv_len = query.shape[1], query.shape[2], key.shape[2]
    seen = seen_elements(bounds, heads, q_len, kv_len, mask_mod, block_mask, is_causal)
    wide = kept.repeat_interleave(block_size[0], 2).repeat_interleave(block_size[1], 3)
    seen = seen & wide[:, :, :q_len, :kv_len]
    logits = query.double() @ repeat_heads(key, heads).double().transpose(-1, -2) * scale
    row = torch.arange(q_len, device=query.device).expand(len(query), -1)
    logits = modified(score_mod, logits, row, torch.arange(kv_len, device=query.device))
    logits = logits.masked_fill(~seen, -torch.inf)
    sink = None if sink_logits is None else sink_logits.double()[:, None]
    # Any number does for the largest, if it is constant: the result does not depend on it.
    largest = logits.detach().amax(-1)
    if sink is not None:
        largest = torch.maximum(largest, sink.detach())
    largest = torch.where(largest == -torch.inf, 0.0, largest)
    weights = (logits - largest[..., None]).exp()
    total = weights.sum(-1)
    whole = total if sink is None else total + (sink - largest).exp()
    output = weights @ repeat_heads(value, heads).double() / torch.where(whole == 0, 1.0, whole)[..., None]
    lse = torch.where(total == 0, -torch.inf, torch.where(total == 0, 1.0, total).log() + largest)
    return output, lse


def seen_elements(
    bounds: Tensor, heads: int, q_len: int, kv_len: int, mask_mod: Mod | None, block_mask: Any, causal: bool
) -> Tensor:
    """Which key each row sees, bool ``[B, Hq, Sq, Skv]``."""
    batch = len(bounds)
    offset, start, end = (bounds[:, n, None, None, None].long() for n in range(3))
    row = torch.arange(q_len, device=bounds.device)
    key = torch.arange(kv_len, device=bounds.device)
    at = offset + row[:, None]
    seen = (start <= at) & (at < end) & (start <= key) & (key < end)
    if causal:
        seen = seen & (key <= at)
    seen = seen.expand(batch, heads, q_len, kv_len)
    masks = [mask_mod]
    if block_mask is not None:
        masks.append(block_mask.mask_mod)
        seen = seen & _listed(block_mask, q_len, kv_len).expand_as(seen)
    for mask in masks:
        if mask is not None:
            arguments = torch.arange(batch, device=key.device), torch.arange(heads, device=key.device)
            # A row of indices per batch row, because pooled rows need it.
            seen = seen & _vmapped(mask)(*arguments, row.expand(batch, -1), key)
    return seen


def _listed(block_mask: Any, q_len: int, kv_len: int) -> Tensor:
    """Elements in the blocks that a BlockMask lists, bool ``[1 or B, 1 or Hq, Sq, Skv]``."""
    size_q, size_k = block_mask.BLOCK_SIZE
    shape = (*block_mask.kv_num_blocks.shape[:2], q_len, kv_len)
    listed = torch.zeros(shape, dtype=torch.bool, device=block_mask.kv_num_blocks.device)
    lists = [(block_mask.kv_num_blocks, block_mask.kv_indices)]
    if block_mask.full_kv_num_blocks is not None:
        lists.append((block_mask.full_kv_num_blocks, block_mask.full_kv_indices))
    for counts, indices in lists:
        for b in range(shape[0]):
            for h in range(shape[1]):
                for block in range(counts.shape[2]):
                    rows = slice(block * size_q, (block + 1) * size_q)
                    for other in indices[b, h, block, : int(counts[b, h, block])].tolist():
                        listed[b, h, rows, other * size_k : (other + 1) * size_k] = True
    return listed


def _vmapped(mod: Mod, score: bool = False) -> Mod:
    """A mod over b ``[B]``, h ``[H]``, q_idx ``[B, M]``, kv_idx ``[N]`` and, before them, a score ``[B, H, M, N]``."""
    for of_b, of_h, of_q, of_kv in (
        (None, None, None, 0),
        (None, None, 0, None),
        (None, 0, None, None),
        (0, None, 0, None),
    ):
        mod = torch.vmap(mod, in_dims=(0, of_b, of_h, of_q, of_kv) if score else (of_b, of_h, of_q, of_kv))

    def call(*arguments: Tensor) -> Tensor:
        with TransformGetItemToIndex():
            return mod(*arguments)

    return call


def modified(score_mod: Mod | None, logits: Tensor, rows: Tensor, keys: Tensor) -> Tensor:
    """Logits ``[B, H, M, N]`` after the score_mod, in their own dtype.

    Args:
        score_mod: As flex_attention takes it.
        logits: ``[B, H, M, N]``.
        rows: int64 ``[B, M]``: which query row each one is.
        keys: int64 ``[N]``: which key each column is.
    """
    if score_mod is None:
        return logits
    b, h = (torch.arange(n, device=logits.device) for n in logits.shape[:2])
    return _vmapped(score_mod, score=True)(logits, b, h, rows, keys).to(logits.dtype)


def near_elements(seen: Tensor, bounds: Tensor, causal: bool, sink_tokens: int, local_tokens: int) -> Tensor:
    """Sink and local keys of the rows that see something, seen or not, bool ``[B, Hq, Sq, Skv]``."""
    key = torch.arange(seen.shape[3], device=seen.device)
    at = torch.arange(seen.shape[2], device=seen.device)[:, None] + bounds[:, 0, None, None, None].long()
    first, _ = _ends(seen)
    sink = (key >= first) & (key < first + sink_tokens)
    distance = at - key if causal else (at - key).abs()
    local = (distance >= 0) & (distance < local_tokens)
    return (sink | local) & seen.any(-1, keepdim=True)


def early_elements(seen: Tensor, min_length: int) -> Tensor:
    """All from the first to the last key of the rows that see less than `min_length` further than their first key."""
    key = torch.arange(seen.shape[3], device=seen.device)
    first, last = _ends(seen)
    return seen.any(-1, keepdim=True) & (last - first < min_length) & (key >= first) & (key <= last)


def _ends(seen: Tensor) -> tuple[Tensor, Tensor]:
    """First and last key that each row sees, int64 ``[B, Hq, Sq, 1]``; they mean nothing where there is none."""
    flags = seen.byte()
    return flags.argmax(-1, keepdim=True), seen.shape[3] - 1 - flags.flip(-1).argmax(-1, keepdim=True)


def relative_choice(call: Call, config: Any) -> Choice:
    """The candidates in which an estimated score reaches its row's limit."""
    query, key, bounds, scale, dtype = call.query, call.key, call.bounds, call.scale, call.dtype
    heads, (block_q, block_k) = query.shape[1], config.block_size
    row = torch.arange(query.shape[2], device=query.device).expand(len(query), -1)
    column = torch.arange(key.shape[2], device=query.device)

    exact = query.to(dtype) @ repeat_heads(key, heads).to(dtype).transpose(-1, -2) * scale
    exact = modified(call.score_mod, exact, row, column).masked_fill(~(call.seen & call.sink_local), -torch.inf)
    threshold = torch.as_tensor(config.rule.threshold, dtype=dtype, device=key.device).reshape(-1, 1)
    limit = exact.logsumexp(-1) + threshold.log()

    query_codes, query_scale = quantize_rows(query, config.rule.bits)
    key_codes, key_scale = quantize_groups(key, call.mean, bounds, block_k, config.rule.bits)
    product = query_codes.to(dtype) @ repeat_heads(key_codes, heads).to(dtype).transpose(-1, -2)
    group = (column - bounds[:, 1, None].long()).clamp_min(0) // block_k  # [B, Skv]
    of_key = key_scale.gather(2, group[:, None].expand(-1, key.shape[1], -1)).to(dtype)
    of_key = of_key.repeat_interleave(heads // key.shape[1], 1)
    estimate = product * (of_key[:, :, None] * (query_scale.to(dtype) * scale)[..., None])
    shift = (query.to(dtype) * repeat_heads(call.mean[:, :, None], heads).to(dtype)).sum(-1) * scale
    estimate = modified(call.score_mod, estimate + shift[..., None], row, column)

    # Negated, so that a NaN on either side keeps the block.
    hit = block_any(call.seen & ~(estimate < limit[..., None]), block_q, block_k) & call.candidate
    margin = (estimate - limit[..., None]).masked_fill(~call.seen, -torch.inf)
    margin = block_max(margin, block_q, block_k).masked_fill(~call.candidate, -torch.inf)
    return Choice(hit, margin, torch.zeros_like(hit))


def mass_choice(call: Call, config: Any, budget: int | None) -> Choice:
    """The candidates that take at least the threshold of some pooled row's softmax.

    Blocks with a key that is not finite are hit in any case, and do not count for the budget. Without a score_mod
    masses and decisions are those of plain causal calls.
    """
    if call.score_mod is not None:
        return _modified_mass_choice(call, config, budget)
    options = mass_options(config)
    block_q, block_k = options.block_size
    heads = call.query.shape[1]
    moments = quantize_moments(call.key, call.mean, call.bounds, block_k, options.sub_block, options.bits)
    # A block that padding on the left cuts is no sink where there are none. It is kept, and of the exact part.
    cut = torch.arange(call.full.shape[3], device=call.key.device) * block_k < call.bounds[:, 1, None]  # [B, nk]
    unasked = call.candidate & (repeat_heads(moments.nonfinite, heads)[:, :, None] | cut[:, None, None])
    masses = row_masses(call._replace(candidate=call.candidate & ~cut[:, None, None]), options, moments)
    threshold = torch.as_tensor(config.rule.threshold, dtype=torch.float32, device=call.key.device).expand(heads)
    hit, margin, dropped, _ = decide(masses, threshold[:, None], unasked, block_q // options.pool, budget)
    return Choice(hit | unasked, margin.masked_fill(unasked, torch.inf), dropped)


def row_masses(call: Call, options: MassOptions, moments: Moments) -> RowMasses:
    """How pooled rows spread their softmax where there is no score_mod, as `sale_flex.reference.mass.row_masses`.

    A candidate whose keys are valid and seen by all rows that are no padding is weighed from codes, others exactly. A
    row counts in units of what it sees in always-kept blocks, of which `total` holds one. Where it sees nothing there
    is none, and it counts in halves of the larger of two: its largest sub-block, and all that it sees in candidates
    that are weighed exactly. A total is above 1 so, as it is everywhere else.

    Args:
        call: What the rule decides on.
        options: Sizes and widths.
        moments: Codes of the keys.
    """
    query, bounds, scale, dtype = call.query, call.bounds, call.scale, call.dtype
    (block_q, block_k), size = options.block_size, options.sub_block
    rows, blocks, kv_len = block_q // options.pool, call.full.shape[3], call.key.shape[2]
    pooled = pool_rows(query, bounds, block_q, options.pool, options.sample)
    exists = (pooled.position >= 0)[:, None, :, None]
    sees = torch.nn.functional.pad(call.seen, (0, 0, 0, -query.shape[2] % block_q))
    sees = sees.unflatten(2, (-1, options.pool)).any(3)  # what one of a pool's rows sees
    from_codes = call.candidate & _whole(call, block_q, block_k)
    candidate, whole = (x.repeat_interleave(rows, 2) & exists for x in (call.candidate, from_codes))
    in_candidate = candidate.repeat_interleave(block_k, 3)[..., :kv_len]

    smoothed = call.key.to(dtype) - call.mean.to(dtype)[:, :, None]
    logits = pooled_logits(pooled, smoothed, scale)
    finite = logits.isfinite()
    log_exact = logits.masked_fill(~finite, ABSENT).masked_fill(~sees | in_candidate, -torch.inf).logsumexp(-1) * LOG2E
    in_partial = (candidate & ~whole).repeat_interleave(block_k, 3)[..., :kv_len]
    logits = logits.masked_fill(~(sees & finite & in_partial), -torch.inf)
    logits = torch.nn.functional.pad(logits, (0, blocks * block_k - kv_len), value=-torch.inf)
    partial = logits.unflatten(-1, (blocks, block_k)).logsumexp(-1) * LOG2E

    coded = coded_logits(pooled, moments, block_k, size, scale, options.bits)
    of_subs = whole.repeat_interleave(block_k // size, 3)
    largest = coded.masked_fill(~of_subs, -(2**62)).amax(-1).to(dtype) / 2**FRACTION + math.log2(size)
    largest = torch.maximum(largest.masked_fill(~whole.any(-1), -torch.inf), logits.logsumexp(-1) * LOG2E)
    own = log_exact > -torch.inf
    unit = torch.where(own, log_exact, torch.where(largest > -torch.inf, largest - 1, 0.0))
    values = exponentials(coded, unit, size).to(dtype).unflatten(-1, (blocks, -1)).sum(-1)
    exact = (partial - unit[..., None]).clamp_max(100).exp2()
    sums = torch.where(whole, values, exact).masked_fill(~candidate, 0.0)
    total = own + sums.sum(-1)
    finite_row = pooled.rows.isfinite().all(-1)
    # A row that sees nothing asks for nothing, if it is finite.
    return RowMasses(sums, total, candidate & ((total > 0) | ~finite_row)[..., None], finite_row)


def _whole(call: Call, block_q: int, block_k: int) -> Tensor:
    """Blocks with valid keys alone that all rows see, rows of padding aside, bool ``[B, Hq, nq, nk]``."""
    at = torch.arange(call.query.shape[2], device=call.bounds.device) + call.bounds[:, :1]
    real = (at >= call.bounds[:, 1:2]) & (at < call.bounds[:, 2:])  # [B, Sq]
    first = torch.arange(call.full.shape[3], device=call.bounds.device) * block_k
    valid = (first >= call.bounds[:, 1:2]) & (first + block_k <= call.bounds[:, 2:])  # [B, nk]
    return valid[:, None, None] & ~block_any(real[:, None, :, None] & ~call.seen, block_q, block_k)


def _modified_mass_choice(call: Call, config: Any, budget: int | None) -> Choice:
    """`mass_choice` under a score_mod: masses are logarithms, compared as they are."""
    query, key, bounds, dtype = call.query, call.key, call.bounds, call.dtype
    options = mass_options(config)
    block_q, block_k = options.block_size
    rows = block_q // options.pool
    weights = row_weights(call, options)
    moments = quantize_moments(key, call.mean, bounds, block_k, options.sub_block, options.bits)
    unasked = call.candidate & repeat_heads(moments.nonfinite, query.shape[1])[:, :, None]

    threshold = torch.as_tensor(config.rule.threshold, dtype=dtype, device=key.device).expand(query.shape[1])
    threshold = threshold[:, None, None]
    cut = weights.total[..., None] + torch.where(threshold > 0, threshold.log(), FLOOR)
    # -inf - -inf: a row that sees nothing, or a block without anything for the row.
    above = (weights.weight - cut).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    above = above.masked_fill(~weights.finite[..., None] | (threshold >= 1), -torch.inf)
    above = above.unflatten(2, (-1, rows)).amax(3)  # [B, Hq, nq, nk]
    everything = (~weights.finite).unflatten(2, (-1, rows)).any(3)[..., None] | (threshold == 0)

    def hits(raised: Tensor) -> Tensor:
        """What is hit with cuts that many steps higher, ``[B, Hq, nq, 1]``."""
        return call.candidate & ((above >= raised * STEP) | (everything & (raised == 0)))

    raised = torch.zeros(*call.candidate.shape[:3], 1, dtype=torch.int64, device=key.device)
    asked = hit = hits(raised)
    while budget is not None and bool((over := (hit & ~unasked).sum(-1, keepdim=True) > budget).any()):
        raised = raised + over
        hit = hits(raised)
    margin = (above - raised * STEP).masked_fill(everything & (raised == 0), torch.inf)
    margin = margin.masked_fill(~call.candidate, -torch.inf).masked_fill(unasked, torch.inf)
    return Choice(hit | unasked, margin, asked & ~hit & ~unasked)


def row_weights(call: Call, options: MassOptions) -> RowWeights:
    """How pooled rows spread their softmax under a score_mod: from codes what is full and valid, exactly the rest."""
    query, key, bounds, scale, dtype = call.query, call.key, call.bounds, call.scale, call.dtype
    heads, q_len, kv_len = query.shape[1], query.shape[2], key.shape[2]
    block_q, block_k = options.block_size
    blocks = call.full.shape[3]
    pooled = pool_rows(query, bounds, block_q, options.pool, options.sample)
    index = (pooled.position - bounds[:, :1]).clamp_min(0)  # [B, np]: which query row the last of a pool is
    exists = (pooled.position >= 0)[:, None]  # [B, 1, np]
    rows = pooled.rows.to(dtype)
    column = torch.arange(kv_len, device=key.device)

    # A pooled row sees what one of its rows sees.
    sees = torch.nn.functional.pad(call.seen, (0, 0, 0, -q_len % block_q)).unflatten(2, (-1, options.pool)).any(3)
    logits = rows @ repeat_heads(key, heads).to(dtype).transpose(-1, -2) * scale
    logits = modified(call.score_mod, logits, index, column)
    logits = logits.masked_fill(~(sees & logits.isfinite()), -torch.inf)
    logits = torch.nn.functional.pad(logits, (0, blocks * block_k - kv_len), value=-torch.inf)
    exact = logits.unflatten(-1, (blocks, block_k)).logsumexp(-1)

    size = options.sub_block
    subs = block_k // size
    moments = quantize_moments(key, call.mean, bounds, block_k, size, options.bits)
    coded_rows, width = (rotate(pooled.rows), rotation_width(query.shape[3])) if size == 1 else (pooled.rows, 1)
    codes, row_scale = quantize_rows(coded_rows, options.bits)
    row_scale = row_scale.to(dtype)[..., None]

    def products(x: Tensor, y: Tensor) -> Tensor:
        return x.to(dtype) @ repeat_heads(y, heads).to(dtype).transpose(-1, -2)

    def of_subs(x: Tensor) -> Tensor:
        return repeat_heads(x, heads).to(dtype).repeat_interleave(subs, -1)[:, :, None]

    shift = rows @ repeat_heads(call.mean[:, :, None], heads).to(dtype).transpose(-1, -2) * scale  # [B, Hq, np, 1]
    middle = torch.arange(blocks * subs, device=key.device) * size + size // 2
    estimate = products(codes, moments.mean_codes) * (row_scale * scale / width * of_subs(moments.mean_scale))
    estimate = estimate + shift
    estimate = modified(call.score_mod, estimate, index, middle.clamp_max(kv_len - 1))
    estimate = estimate.masked_fill(~estimate.isfinite(), -torch.inf)
    if size > 1:
        squares = codes.long().square()
        unit = 1
        if options.bits == 8:
            squares, unit = (squares + 64) // 128, 128
        spread = row_scale**2 * unit * scale**2 / 2 * of_subs(moments.var_scale)
        spread = products(squares, moments.var_codes) * spread
        # Infinity times 0: a row of some 1e19 and more. The bound holds for any variance.
        estimate = estimate + spread.nan_to_num(torch.inf, torch.inf).clamp_max(2.0 * (size - 1))
    coded = (estimate + math.log(size)).unflatten(-1, (blocks, subs)).logsumexp(-1)

    at = torch.arange(blocks, device=key.device) * block_k
    valid = (at >= bounds[:, 1, None]) & (at + block_k <= bounds[:, 2, None])  # [B, nk]
    from_codes = (call.candidate & call.full & valid[:, None, None]).repeat_interleave(block_q // options.pool, 2)
    weight = torch.where(from_codes, coded, exact).masked_fill(~exists[..., None], -torch.inf)
    return RowWeights(weight, weight.logsumexp(-1), pooled.rows.isfinite().all(-1) | ~exists)
