# SPDX-License-Identifier: BSD-3-Clause
"""The custom ops: schema, fake, and dispatch.

On CUDA tensors an op launches the Triton kernel of the same name from `sale_flex.kernels`; everywhere else it runs the
torch implementation of the same name from `sale_flex.ops.fallback`. Either is imported when an op first runs. The ops
are opaque to torch.compile, have fixed shapes, read no value on the host, and are for inference: no gradient passes.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sale_flex.blocks.bounds import query_bounds as _query_bounds

_LIBRARY = torch.library.Library("sale_flex", "DEF")


Adapter = Callable[[Sequence[Any]], Sequence[Any]]
"""From an op's arguments to its implementation's."""


def define(
    schema: str,
    fake: Callable[..., Any],
    module: str | Callable[..., Any],
    adapters: tuple[Adapter, Adapter] = (tuple, tuple),
) -> Any:
    """Define an op of the library.

    Args:
        schema: Its schema, which begins with its name.
        fake: Shapes and dtypes of its results.
        module: The module of kernels and of fallback whose function of the op's name implements it, or a callable.
        adapters: What the kernel's and the fallback's arguments are made with.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    if isinstance(module, str):
        for_kernel, for_fallback = adapters
        _LIBRARY.impl(
            name, _lazy(f"sale_flex.kernels.{module}", name, lambda args: for_kernel(_contiguous(args))), "CUDA"
        )
        fallback = _lazy(f"sale_flex.ops.fallback.{module}", name, for_fallback)
        _LIBRARY.impl(name, fallback, "CompositeExplicitAutograd")
    else:
        _LIBRARY.impl(name, module, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sale_flex::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.sale_flex, name).default


def _lazy(module: str, name: str, adapt: Adapter) -> Callable[..., Any]:
    def launch(*args: Any) -> Any:
        return getattr(import_module(module), name)(*adapt(args))

    return launch


def _contiguous(args: Sequence[Any]) -> list[Any]:
    """A kernel's arguments, contiguous but for queries, keys and values, whose strides kernels are told.

    The rest is read by its shape alone: an expanded threshold, or a row of zeros that stands for many, would be read
    beyond its end.
    """
    return [arg.contiguous() if isinstance(arg, Tensor) and not _has_strides(arg) else arg for arg in args]


def _has_strides(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_floating_point()


def _ceil(length: int, size: int) -> int:
    return (length + size - 1) // size


def _codes(x: Tensor, packed: bool) -> Tensor:
    batch, heads, rows, dim = x.shape
    dim, dtype = (dim // 2, torch.uint8) if packed else (dim, torch.int8)
    return x.new_empty(batch, heads, _ceil(rows, 128) * 128, dim, dtype=dtype)


def _fake_rows(x: Tensor, bits: int, packed: bool = False) -> tuple[Tensor, Tensor]:
    return _codes(x, packed), x.new_empty(x.shape[:3], dtype=torch.float32)


def _fake_groups(
    key: Tensor, mean: Tensor, bounds: Tensor, group: int, bits: int, packed: bool = False
) -> tuple[Tensor, Tensor]:
    codes = _codes(key, packed)
    return codes, key.new_empty(*key.shape[:2], codes.shape[2] // group, dtype=torch.float32)


def _fake_limits(query: Tensor, *_: Any) -> Tensor:
    batch, heads, rows, _dim = query.shape
    return query.new_empty(batch, heads, _ceil(rows, 128) * 128, dtype=torch.float32)


def _fake_scan(
    query_codes: Tensor,
    limit: Tensor,
    key_codes: Tensor,
    key_scale: Tensor,
    bounds: Tensor,
    q_len: int,
    kv_len: int,
    block_q: int,
    block_k: int,
    local_tokens: int,
    from_zero: bool,
) -> Tensor:
    batch, heads = query_codes.shape[:2]
    words = _ceil(_ceil(kv_len, block_k), 32)
    return query_codes.new_empty(batch, heads, _ceil(q_len, block_q), words, dtype=torch.int32)


def _fake_moments(
    key: Tensor, mean: Tensor, bounds: Tensor, block_k: int, sub_block: int, bits: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, heads, kv_len, dim = key.shape
    subs, blocks = block_k // sub_block, _ceil(kv_len, block_k)
    rows = _ceil(blocks * subs, 256) * 256
    sizes = (rows, rows if sub_block > 1 else 0)
    codes = [key.new_empty(batch, heads, size, dim, dtype=torch.int8) for size in sizes]
    scales = [key.new_empty(batch, heads, size // subs, dtype=torch.float32) for size in sizes]
    nonfinite = key.new_empty(batch, heads, _ceil(blocks, 32), dtype=torch.int32)
    return codes[0], scales[0], codes[1], scales[1], nonfinite


def _fake_mass(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    nonfinite, block_q = args[6], args[10]
    rows = (*query.shape[:2], _ceil(query.shape[2], block_q))
    return query.new_empty(*rows, nonfinite.shape[2], dtype=torch.int32), query.new_empty(rows, dtype=torch.int32)


def _fake_nonfinite(value: Tensor, bounds: Tensor, block_k: int) -> Tensor:
    batch, heads, kv_len, _ = value.shape
    return value.new_empty(batch, heads, _ceil(_ceil(kv_len, block_k), 32), dtype=torch.int32)


def _fake_lists(
    hits: Tensor,
    nonfinite: Tensor | None,
    bounds: Tensor,
    kv_heads: int,
    q_len: int,
    kv_len: int,
    block_q: int,
    block_k: int,
    sink_tokens: int,
    local_tokens: int,
    min_length: int,
    partial_width: int,
    full_width: int,
    want_kept: bool,
    leave_early: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = hits.shape[:3]
    kept = torch.empty_like(hits) if want_kept else hits.new_empty(0)
    return kept, hits.new_empty(rows), hits.new_empty(rows), hits.new_empty(*rows, partial_width + full_width)


query_bounds = define(
    "query_bounds(Tensor query, Tensor key, Tensor? kv_range, Tensor? q_offset, SymInt offset) -> Tensor",
    lambda query, *_: query.new_empty(query.shape[0], 3, dtype=torch.int32),
    _query_bounds,
)
key_mean = define(
    "key_mean(Tensor key, Tensor bounds, int smooth_tokens) -> Tensor",
    lambda key, *_: key.new_empty(key.shape[0], key.shape[1], key.shape[3], dtype=torch.float32),
    "key_mean",
)
quantize_rows = define(
    "quantize_rows(Tensor x, int bits, bool packed=False) -> (Tensor, Tensor)", _fake_rows, "quantize"
)
quantize_groups = define(
    "quantize_groups(Tensor key, Tensor mean, Tensor bounds, int group, int bits, bool packed=False)"
    " -> (Tensor, Tensor)",
    _fake_groups,
    "quantize",
)
row_limits = define(
    "row_limits(Tensor query, Tensor key, Tensor mean, Tensor query_scale, Tensor bounds, Tensor threshold,"
    " float scale, int sink_tokens, int local_tokens) -> Tensor",
    _fake_limits,
    "row_limits",
)
scan_max = define(
    "scan_max(Tensor query_codes, Tensor limit, Tensor key_codes, Tensor key_scale, Tensor bounds, SymInt q_len,"
    " SymInt kv_len, int block_q, int block_k, int local_tokens, bool from_zero) -> Tensor",
    _fake_scan,
    "scan",
)
quantize_moments = define(
    "quantize_moments(Tensor key, Tensor mean, Tensor bounds, int block_k, int sub_block, int bits)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_moments,
    "moments",
)
mass_hits = define(
    "mass_hits(Tensor query, Tensor key, Tensor mean, Tensor mean_codes, Tensor mean_scale, Tensor var_codes,"
    " Tensor var_scale, Tensor nonfinite, Tensor bounds, Tensor threshold, float scale, int block_q, int block_k,"
    " int sub_block, int pool, bool sample, int bits, int sink_tokens, int local_tokens, SymInt budget)"
    " -> (Tensor, Tensor)",
    _fake_mass,
    "mass",
)
nonfinite_blocks = define(
    "nonfinite_blocks(Tensor value, Tensor bounds, int block_k) -> Tensor", _fake_nonfinite, "compact"
)
build_lists = define(
    "build_lists(Tensor hits, Tensor? nonfinite, Tensor bounds, int kv_heads, SymInt q_len, SymInt kv_len, int block_q,"
    " int block_k, int sink_tokens, int local_tokens, SymInt min_length, SymInt partial_width, SymInt full_width,"
    " bool want_kept, bool leave_early) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_lists,
    "compact",
)
kept_table = define(
    "kept_table(Tensor kept, int block_q, int block_k, SymInt table_words) -> (Tensor, Tensor)",
    lambda kept, _block_q, _block_k, table_words: (kept.new_empty(table_words), kept.new_empty(5)),
    "lookup",
)
attended = define(
    "attended(Tensor query, Tensor value, Tensor partial_num, Tensor full_num, int block_q, int block_k) -> ()",
    lambda *_: None,
    lambda *_: None,
)
