# SPDX-License-Identifier: BSD-3-Clause
"""The custom ops of programmed calls: those with a score_mod, a mask_mod, a user's block mask, or no causality.

No callable crosses the boundary of an op. A mod travels as the key of its program and the tensors that it captures, and
where the op runs, the key finds the generated Triton function (CUDA) or the traced graph (elsewhere). ``""`` is no mod.
What the results are is said in `sale_flex.blocks.mask_spec`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sale_flex.blocks.bits import pack_bits
from sale_flex.blocks.geometry import audit_slots
from sale_flex.mods.compiler import program
from sale_flex.ops import define


def _for_kernel(args: Sequence[Any]) -> list[Any]:
    return _with_mods(args, lambda key, tensors: (program(key).triton, program(key).arguments(tensors)))


def _for_fallback(args: Sequence[Any]) -> list[Any]:
    return _with_mods(args, lambda key, tensors: partial(program(key).evaluate, tensors))


def _with_mods(args: Sequence[Any], make: Any) -> list[Any]:
    """The arguments, with one for each key and the list of tensors behind it."""
    made: list[Any] = []
    rest = iter(args)
    for arg in rest:
        if isinstance(arg, str):
            tensors = list(next(rest))
            made.append(make(arg, tensors) if arg else None)
        else:
            made.append(arg)
    return made


_ADAPTERS = (_for_kernel, _for_fallback)

_SIGHT = (
    "Tensor bounds, bool causal, str mask_key, Tensor[] mask_tensors, Tensor? listed, SymInt listed_q, SymInt listed_k"
)


def _ceil(length: int, size: int) -> int:
    return (length + size - 1) // size


def _fake_structure(bounds: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    heads, q_len, kv_len, block_q, block_k = args[8:]
    batch, query_blocks = bounds.shape[0], _ceil(q_len, block_q)
    words = (batch, heads, query_blocks, _ceil(_ceil(kv_len, block_k), 32))
    return bounds.new_empty(words), bounds.new_empty(words), bounds.new_empty(batch, heads, 2, query_blocks * block_q)


def _fake_lists(
    visible: Tensor, full: Tensor, rows: Tensor, bounds: Tensor, causal: bool, q_len: int, kv_len: int, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    lines, block_k = visible.shape[:3], args[1]
    return torch.empty_like(visible), visible.new_empty(*lines, 3), visible.new_empty(*lines, _ceil(kv_len, block_k))


def _fake_pool(
    query: Tensor,
    mean: Tensor,
    bounds: Tensor,
    scale: float,
    block_q: int,
    pool: int,
    sample: bool,
    bits: int,
    squares: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, heads, q_len, dim = query.shape
    rows = _ceil(q_len, block_q) * (block_q // pool)
    codes = query.new_empty(batch, heads, rows, dim, dtype=torch.int8)
    square_codes = query.new_empty(batch, heads, rows if squares else 0, dim, dtype=torch.int8)
    scales = [query.new_empty(batch, heads, rows, dtype=torch.float32) for _ in range(2)]
    return query.new_empty(batch, heads, rows, dim), codes, square_codes, scales[0], scales[1]


def _fake_mass(key: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    nonfinite, codes, counts = args[4], args[6], args[10]
    lines = (*codes.shape[:2], counts.shape[2])
    return counts.new_empty(*lines, nonfinite.shape[2]), counts.new_empty(lines)


def _fake_limits(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    rows = (*query.shape[:2], args[4].shape[3])
    return query.new_empty(rows, dtype=torch.float32), query.new_empty(rows, dtype=torch.float32)


def _fake_scan(query_codes: Tensor, *args: Any) -> Tensor:
    counts, lists = args[5], args[6]
    return counts.new_empty(*query_codes.shape[:2], counts.shape[2], _ceil(lists.shape[3], 32))


def _fake_compact(
    hits: Tensor,
    nonfinite: Tensor | None,
    visible: Tensor,
    full: Tensor,
    always: Tensor,
    kv_heads: int,
    partial_width: int,
    full_width: int,
    key_blocks: int,
    want_kept: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    lines = hits.shape[:3]
    kept = torch.empty_like(hits) if want_kept else hits.new_empty(0)
    nums = [hits.new_empty(lines) for _ in range(3)]
    return kept, nums[0], nums[1], hits.new_empty(*lines, partial_width + full_width), nums[2]


def _fake_rows(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query, memory_format=torch.contiguous_format), query.new_empty(
        query.shape[:3], dtype=torch.float32
    )


def _fake_audit(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(*query.shape[:2], audit_slots(query.shape[2]) + 2, 3, dtype=torch.float32)


def _listed_bits(
    partial_num: Tensor, partial_idx: Tensor, full_num: Tensor | None, full_idx: Tensor | None, key_blocks: int
) -> Tensor:
    """Bits of the blocks in a BlockMask's lists, int32 ``[B, H, nq, ceil(nk / 32)]``."""
    lines = partial_num.shape
    flags = torch.zeros(*lines, key_blocks + 1, dtype=torch.bool, device=partial_num.device)
    for num, index in ((partial_num, partial_idx), (full_num, full_idx)):
        if num is None or index is None:
            continue
        slot = torch.arange(index.shape[-1], device=index.device)
        # What stands behind the count goes to a column that is cut off.
        flags.scatter_(-1, torch.where(slot < num[..., None], index, key_blocks).long(), True)
    return pack_bits(flags[..., :key_blocks])


block_structure = define(
    f"block_structure({_SIGHT.replace('Tensor? listed', 'str range_key, Tensor[] range_tensors, Tensor? listed')},"
    " SymInt heads, SymInt q_len, SymInt kv_len, int block_q, int block_k) -> (Tensor, Tensor, Tensor)",
    _fake_structure,
    "structure",
    _ADAPTERS,
)
block_lists = define(
    "block_lists(Tensor visible, Tensor full, Tensor rows, Tensor bounds, bool causal, SymInt q_len, SymInt kv_len,"
    " int block_q, int block_k, int sink_tokens, int local_tokens, SymInt min_length) -> (Tensor, Tensor, Tensor)",
    _fake_lists,
    "structure",
)
listed_pool = define(
    "listed_pool(Tensor query, Tensor mean, Tensor bounds, float scale, int block_q, int pool, bool sample, int bits,"
    " bool squares) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_pool,
    "listed_pool",
)
listed_mass = define(
    "listed_mass(Tensor key, Tensor mean_codes, Tensor mean_scale, Tensor var_codes, Tensor var_scale,"
    " Tensor nonfinite, Tensor rows, Tensor codes, Tensor square_codes, Tensor code_scale, Tensor shift,"
    f" Tensor counts, Tensor lists, Tensor full, {_SIGHT}, str score_key, Tensor[] score_tensors, Tensor threshold,"
    " float scale, SymInt q_len, int block_q, int block_k, int sub_block, int pool, int bits, SymInt budget)"
    " -> (Tensor, Tensor)",
    _fake_mass,
    "listed_mass",
    _ADAPTERS,
)
listed_limits = define(
    f"listed_limits(Tensor query, Tensor key, Tensor mean, Tensor counts, Tensor lists, Tensor rows, {_SIGHT},"
    " str score_key, Tensor[] score_tensors, Tensor threshold, float scale, int block_q, int block_k, int sink_tokens,"
    " int local_tokens) -> (Tensor, Tensor)",
    _fake_limits,
    "listed_relative",
    _ADAPTERS,
)
listed_scan = define(
    "listed_scan(Tensor query_codes, Tensor query_scale, Tensor key_codes, Tensor key_scale, Tensor limit,"
    f" Tensor shift, Tensor counts, Tensor lists, {_SIGHT}, str score_key, Tensor[] score_tensors, float scale,"
    " SymInt q_len, SymInt kv_len, int block_q, int block_k) -> Tensor",
    _fake_scan,
    "listed_relative",
    _ADAPTERS,
)
listed_compact = define(
    "listed_compact(Tensor hits, Tensor? nonfinite, Tensor visible, Tensor full, Tensor always, int kv_heads,"
    " SymInt partial_width, SymInt full_width, SymInt key_blocks, bool want_kept)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_compact,
    "listed_compact",
)
listed_bits = define(
    "listed_bits(Tensor partial_num, Tensor partial_idx, Tensor? full_num, Tensor? full_idx, SymInt key_blocks)"
    " -> Tensor",
    lambda num, _idx, _full_num, _full_idx, key_blocks: num.new_empty(*num.shape, _ceil(key_blocks, 32)),
    _listed_bits,
)
listed_rows = define(
    f"listed_rows(Tensor query, Tensor key, Tensor value, Tensor kept, {_SIGHT}, str score_key, Tensor[] score_tensors,"
    " float scale, int block_q, int block_k) -> (Tensor, Tensor)",
    _fake_rows,
    "listed_rows",
    _ADAPTERS,
)
audit_rows = define(
    f"audit_rows(Tensor query, Tensor key, Tensor hits, Tensor? nonfinite, Tensor? always, Tensor? rows, {_SIGHT},"
    " str score_key, Tensor[] score_tensors, float scale, float least, int block_q, int block_k, int sink_tokens,"
    " int local_tokens, SymInt min_length) -> Tensor",
    _fake_audit,
    "audit",
    _ADAPTERS,
)
