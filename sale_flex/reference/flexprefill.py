# SPDX-License-Identifier: BSD-3-Clause
"""FlexPrefill (arXiv 2502.20766, section 3): verticals and slashes that cover the last rows' softmax, or pooled blocks.

The share gamma to cover is 1 - threshold. Left to implementations is the order of sums. Margins are in nats: by that
much every share, sum and pooled share may move before the decision on a block can change.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sale_flex.reference.call import Call, exact_logits
from sale_flex.reference.common import (
    Choice,
    block_max,
    real_rows,
    repeat_heads,
    scaled_products,
    valid_keys,
)

FLOOR = 2.0**-100
"""Sums of shares below it are no different from 0: those of float32 underflow."""


class LastRows(NamedTuple):
    """The representative rows: the last real ones of every batch row."""

    at: Tensor
    """int64 ``[B, R]``: query rows."""
    there: Tensor
    """bool ``[B, R]``."""


class Sums(NamedTuple):
    """The representative rows' softmax, summed over rows."""

    vertical: Tensor
    """``[B, Hq, Skv]``: by key."""
    slash: Tensor
    """``[B, Hq, 2 N]``, N keys in whole blocks: by distance d of a row from a key, 0 to N - 1, and behind that those
    below 0 as d + 2 N."""


def last_rows(call: Call, count: int) -> LastRows:
    """The last `count` rows that are no padding."""
    q_len = call.query.shape[2]
    real = real_rows(call.bounds, q_len)
    stop = torch.where(real, torch.arange(q_len, device=real.device) + 1, 0).amax(-1, keepdim=True)
    index = stop - count + torch.arange(count, device=real.device)
    there = (index >= 0) & real.gather(1, index.clamp_min(0))
    return LastRows(index.clamp_min(0), there)


def last_row_sums(call: Call, rows: LastRows, block_k: int) -> Sums:
    """Sums of the softmax of representative rows, by key and by distance.

    Logits that are not finite count as hidden.
    """
    heads, kv_len = call.query.shape[1], call.key.shape[2]
    query = call.query.gather(2, rows.at[:, None, :, None].expand(-1, heads, -1, call.query.shape[3]))
    logits = exact_logits(call, query, rows.at)
    at = rows.at[:, None, :, None].expand(-1, call.elements.shape[1], -1, kv_len)
    sees = call.elements.gather(2, at) & rows.there[:, None, :, None] & logits.isfinite()
    shares = logits.masked_fill(~sees, -torch.inf).softmax(-1).nan_to_num(0.0)
    length = 2 * block_k * -(-kv_len // block_k)
    position = rows.at + call.bounds[:, :1].long()
    distance = (position[:, :, None] - torch.arange(kv_len, device=position.device)) % length
    slash = shares.new_zeros(*shares.shape[:2], length)
    slash.scatter_add_(2, distance.flatten(1)[:, None].expand(-1, heads, -1), shares.flatten(2))
    return Sums(shares.sum(2), slash)


def flexprefill_choice(call: Call, config: Any) -> Choice:
    """The blocks on the verticals, on the slashes and, in query-aware heads, of the pooled map that are kept.

    Args:
        call: What is decided on.
        config: The fields of `sale_flex.SaleConfig`.
    """
    rule, (block_q, block_k) = config.rule, config.block_size
    heads, q_len = call.query.shape[1:3]
    threshold = torch.as_tensor(rule.threshold, dtype=torch.float32, device=call.key.device).expand(heads)
    share = (1 - threshold.double()).view(-1, 1)
    least = -(-rule.min_budget // block_k)
    most = 2 * call.visible.shape[3] if rule.max_budget is None else -(-rule.max_budget // block_k)
    rows = last_rows(call, rule.last)
    sums = last_row_sums(call, rows, block_k)
    dtype = call.dtype
    queries = _pooled(call.query.to(dtype), real_rows(call.bounds, q_len), block_q)
    keys = repeat_heads(_pooled(call.key.to(dtype), valid_keys(call.bounds, call.key.shape[2]), block_k), heads)

    distance = _divergence(call, rows, sums, keys, block_q, block_k)
    aware = distance < rule.tau**2
    # Where shares move by e nats, those of verticals move by 2 e in their sum, and the divergence by less than 1.6 e.
    certain = ((distance - rule.tau**2).abs() / 1.6).clamp_min(FLOOR)[..., None, None]
    if rule.tau == 0:
        certain = torch.full_like(certain, torch.inf)

    first = (call.bounds[:, 1].long() // block_k).clamp_max(call.visible.shape[3] - 1)
    vertical = _ranked(sums.vertical, first, share, block_k, least, most, aware)
    slash = _ranked(sums.slash, torch.zeros_like(first), share, block_k, least, most, aware)
    margin = torch.maximum(vertical[:, :, None], _on_diagonals(call, slash, block_q, block_k))
    mapped = _mapped(call, queries, keys, share)
    margin = torch.where(aware[..., None, None], torch.maximum(margin, mapped), margin)
    margin = torch.minimum(torch.maximum(margin, -certain), certain)

    unasked = (~queries.isfinite().all(-1))[..., None] | (~keys.isfinite().all(-1))[:, :, None]
    unasked = unasked | (sums.vertical.sum(-1) == 0)[..., None, None] | (threshold == 0)[:, None, None]
    hit = (margin > 0) | unasked
    margin = margin.masked_fill(unasked, torch.inf).masked_fill(~call.candidate, -torch.inf)
    return Choice(hit & call.candidate, margin, torch.zeros_like(hit))


def _pooled(x: Tensor, there: Tensor, size: int) -> Tensor:
    """Mean of every block's rows that are there, ``[B, H, n, D]``; 0 of none."""
    more = -x.shape[2] % size
    x = torch.nn.functional.pad(x.masked_fill(~there[:, None, :, None], 0.0), (0, 0, 0, more))
    count = torch.nn.functional.pad(there, (0, more)).unflatten(-1, (-1, size)).sum(-1).clamp_min(1)
    return x.unflatten(2, (-1, size)).sum(3) / count[:, None, :, None]


def _divergence(call: Call, rows: LastRows, sums: Sums, keys: Tensor, block_q: int, block_k: int) -> Tensor:
    """Jensen-Shannon divergence of pooled attention and verticals, ``[B, Hq]``; the paper's distance is its root.

    Pooled attention is that of the mean of the representative rows that are finite, on the pooled keys of the blocks
    that a query block with a representative row sees.
    """
    heads = call.query.shape[1]
    query = call.query.gather(2, rows.at[:, None, :, None].expand(-1, heads, -1, call.query.shape[3])).to(call.dtype)
    finite = (query.isfinite().all(-1) & rows.there[:, None])[..., None]
    mean = query.masked_fill(~finite, 0.0).sum(2, keepdim=True) / finite.sum(2, keepdim=True).clamp_min(1)
    holds = torch.zeros(len(query), call.visible.shape[2], dtype=torch.bool, device=query.device)
    for b in range(len(query)):
        holds[b, rows.at[b, rows.there[b]] // block_q] = True
    sees = (call.visible & holds[:, None, :, None]).any(2) & keys.isfinite().all(-1)
    logits = scaled_products(mean, keys, call.scale)[:, :, 0]
    p = logits.masked_fill(~sees, -torch.inf).softmax(-1).nan_to_num(0.0)
    q = _by_block(sums.vertical, block_k)
    q = q / q.sum(-1, keepdim=True).clamp_min(torch.finfo(call.dtype).tiny)
    middle = (p + q) / 2
    twice = [(torch.xlogy(x, x) - torch.xlogy(x, middle)).sum(-1) for x in (p, q)]
    return (twice[0] + twice[1]) / 2


def _by_block(x: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size)).sum(-1)


def _ranked(sums: Tensor, first: Tensor, share: Tensor, size: int, least: int, most: int, aware: Tensor) -> Tensor:
    """Margins of the columns, or diagonals, of blocks: the n largest are kept, and `first` ``[B]`` among them.

    As many entries as cover no more than the share, and one, are so many blocks, and one; `least` in query-aware heads.
    """
    cover = sums.sort(-1, descending=True).values.cumsum(-1)
    reach = (share * cover[..., -1:]).clamp_min(0.0)
    asked = ((cover <= reach).sum(-1) + 1) // size + 1
    count = torch.where(aware, least, asked.clamp_min(least).clamp_max(most))
    # One block less if this sum exceeds the share, one more if that one does not.
    less, more = (asked - 1) * size - 2, asked * size - 2
    nats = torch.full_like(reach[..., 0], torch.inf)
    matter = (asked > least) & (asked <= most), (asked >= least) & (asked < most)
    for at, matters, sign in zip((less, more), matter, (1, -1)):
        there = matters & (at >= 0) & (at < cover.shape[-1]) & ~aware
        ratio = (reach / cover.gather(-1, at.clamp(0, cover.shape[-1] - 1)[..., None]))[..., 0]
        nats = torch.where(there, torch.minimum(nats, sign * ratio.log() / 2), nats)
    blocks = _by_block(sums, size).scatter(-1, first[:, None, None].expand(*sums.shape[:2], 1), torch.inf)
    return _margins(blocks, count, nats.clamp_min(0.0))


def _margins(values: Tensor, count: Tensor, nats: Tensor) -> Tensor:
    """Margins where the `count` largest of ``[..., N]`` are kept, and a move by `nats` may change the count."""
    ordered, order = values.sort(dim=-1, descending=True, stable=True)
    size = values.shape[-1]
    count = count.clamp_max(size)[..., None]
    edges = torch.nn.functional.pad(torch.nn.functional.pad(ordered, (1, 0), value=torch.inf), (0, 1))
    kept = torch.arange(size, device=values.device) < count
    other = torch.where(kept, edges.gather(-1, count + 1), edges.gather(-1, count))
    distance = ((ordered + FLOOR).log() - (other + FLOOR).log()) / 2
    limit = nats[..., None].expand_as(distance)
    # Of equal values some may be kept and some not: the sign says which.
    distance = torch.where(kept, torch.minimum(distance, limit).clamp_min(FLOOR), torch.maximum(distance, -limit))
    distance = distance.masked_fill(ordered == torch.inf, torch.inf)
    return torch.empty_like(distance).scatter_(-1, order, distance)


def _on_diagonals(call: Call, slash: Tensor, block_q: int, block_k: int) -> Tensor:
    """Margins of blocks that the diagonal of a distance of whole blocks crosses, ``[B, Hq, nq, nk]``.

    Rows that complete the last query block count as rows.
    """
    query_blocks, key_blocks = call.visible.shape[2:]
    row, key = (torch.arange(n, device=slash.device) for n in (query_blocks * block_q, key_blocks * block_k))
    distance = call.bounds[:, 0, None, None].long() + row[:, None] - key
    group, groups = distance // block_k, slash.shape[-1]
    at = (group % groups).flatten(1)[:, None].expand(-1, slash.shape[1], -1)
    found = slash.gather(2, at).unflatten(2, group.shape[1:])
    crossed = (distance % block_k == 0) & (group >= -key_blocks) & (group < key_blocks)
    return block_max(found.masked_fill(~crossed[:, None], -torch.inf), block_q, block_k)


def _mapped(call: Call, queries: Tensor, keys: Tensor, share: Tensor) -> Tensor:
    """Margins in the softmax of pooled queries and keys, ``[B, Hq, nq, nk]``: the largest that cover the share at most.

    All shares of a head are one list; those as large as the last that is kept are kept too.
    """
    logits = queries @ keys.transpose(-1, -2) * call.scale
    usable = call.visible & logits.isfinite()
    shares = logits.masked_fill(~usable, -torch.inf).softmax(-1).nan_to_num(0.0).flatten(2)
    ordered = shares.sort(-1, descending=True).values
    cover = ordered.cumsum(-1)
    reach = (share * cover[..., -1:]).clamp_min(0.0)
    count = (cover <= reach).sum(-1, keepdim=True)
    edges = torch.nn.functional.pad(torch.nn.functional.pad(cover, (1, 0)), (0, 1), value=torch.inf)
    ratios = reach / edges.gather(-1, count), edges.gather(-1, count + 1) / reach
    nats = torch.minimum(*(ratio.log().nan_to_num(torch.inf, torch.inf) for ratio in ratios))[..., 0] / 2
    least = ordered.gather(-1, (count - 1).clamp_min(0))
    count = torch.where(count > 0, (shares >= least).sum(-1, keepdim=True), 0)[..., 0]
    return _margins(shares, count, nats.clamp_min(0.0)).unflatten(2, call.visible.shape[2:])
