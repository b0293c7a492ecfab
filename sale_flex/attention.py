# SPDX-License-Identifier: BSD-3-Clause
"""`sale_attention`: block mask and compiled attention in one call, or dense attention where that is what is asked."""

from typing import Any, Literal, NamedTuple, TypedDict, Unpack, overload

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention

from sale_flex.autocast import autocast_inputs, without_autocast
from sale_flex.block_mask import build_block_mask, make_bounds, wants_grad
from sale_flex.break_even import early_rows, rows_of_early_blocks
from sale_flex.clock import mark
from sale_flex.config import SaleConfig
from sale_flex.flex import check_backward, run_flex
from sale_flex.geometry import Grid
from sale_flex.key_codes import KeyCodes, reuse_of
from sale_flex.mods import MaskMod, ScoreMod
from sale_flex.sinks import attend_rows, check_sinks, with_sinks
from sale_flex.stats import SaleStats, dense_stats, with_dense_rows
from sale_flex.user_mods import UserMods, check_mods
from sale_flex.validation import check_inputs, settled

_DENSE_MASK_LIMIT = 2**22
"""Elements of an explicit mask that the dense shortcut may build per batch row; above, the block path runs."""


class SaleResult(NamedTuple):
    """Output and counts, for callers who asked for ``stats=True``."""

    output: Tensor
    stats: SaleStats


class LseResult(NamedTuple):
    """Output and log-sum-exp, for callers who asked for ``return_lse=True``."""

    output: Tensor
    lse: Tensor
    """float32 ``[B, Hq, Sq]``: natural logarithm of the sum of exponentials over the kept set; -inf for none."""


class LseStatsResult(NamedTuple):
    """Output, log-sum-exp and counts, for callers who asked for both."""

    output: Tensor
    lse: Tensor
    stats: SaleStats


class AttentionOptions(TypedDict, total=False):
    """The options of `sale_attention` whose types do not change its result."""

    score_mod: ScoreMod | None
    mask_mod: MaskMod | None
    block_mask: BlockMask | None
    causal: bool
    estimate_mods: str
    sink_logits: Tensor | None
    q_offset: int | Tensor | None
    kv_range: Tensor | None
    scale: float | None
    key_codes: KeyCodes | None
    kernel_options: dict[str, Any] | None


@overload
def sale_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: SaleConfig = ...,
    *,
    return_lse: Literal[False] = ...,
    stats: Literal[False] = ...,
    **options: Unpack[AttentionOptions],
) -> Tensor: ...
@overload
def sale_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: SaleConfig = ...,
    *,
    return_lse: Literal[False] = ...,
    stats: Literal[True],
    **options: Unpack[AttentionOptions],
) -> SaleResult: ...
@overload
def sale_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: SaleConfig = ...,
    *,
    return_lse: Literal[True],
    stats: Literal[False] = ...,
    **options: Unpack[AttentionOptions],
) -> LseResult: ...
@overload
def sale_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: SaleConfig = ...,
    *,
    return_lse: Literal[True],
    stats: Literal[True],
    **options: Unpack[AttentionOptions],
) -> LseStatsResult: ...
def sale_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: SaleConfig = SaleConfig(),  # noqa: B008 - frozen
    *,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    block_mask: BlockMask | None = None,
    causal: bool = True,
    estimate_mods: str = "apply",
    sink_logits: Tensor | None = None,
    q_offset: int | Tensor | None = None,
    kv_range: Tensor | None = None,
    scale: float | None = None,
    key_codes: KeyCodes | None = None,
    return_lse: bool = False,
    stats: bool = False,
    kernel_options: dict[str, Any] | None = None,
) -> Tensor | SaleResult | LseResult | LseStatsResult:
    """Attention on the blocks that a low-bit estimate keeps.

    Short prompts (no more keys than ``config.min_length``) and decoding steps (fewer queries than half a block) are
    dense by definition; ``stats`` says so. Where nothing but causality is asked they run scaled_dot_product_attention.
    Everything else builds a block mask and runs compiled flex_attention on it.

    Gradients pass through attention on the chosen blocks; the choice itself has none.

    Under torch.autocast of the query's device type, query, key and value are cast as scaled_dot_product_attention casts
    them: to autocast's dtype, whichever of float32, float16 and bfloat16 they have. Nothing else is.

    Args:
        query: ``[B, Hq, Sq, D]``, float32, float16 or bfloat16, any strides.
        key: ``[B, Hkv, Skv, D]``, Hq a multiple of Hkv, the query's device and, without autocast, its dtype.
        value: ``[B, Hkv, Skv, D]``.
        config: What to keep; see `SaleConfig`.
        score_mod: ``score_mod(score, b, h, q_idx, kv_idx)`` as flex_attention takes it: exact in attention, and applied
            to the estimate too. `sale_flex.mods` has ready ones.
        mask_mod: ``mask_mod(b, h, q_idx, kv_idx)``: what is hidden besides.
        block_mask: A BlockMask whose unlisted blocks are hidden too; see `create_sale_block_mask`.
        causal: Whether a query sees no key behind its own position. False leaves that to the masks.
        estimate_mods: ``"ignore"`` leaves the mods out of the estimate, but not out of attention.
        sink_logits: float ``[Hq]``: a logit per head that takes its share of every row's softmax and has no value, as
            in gpt-oss. The estimate leaves it out: a block's share is of what the tokens get.
        q_offset: Key index of the first query, an int or a 0-d integer tensor; by default ``Skv - Sq``.
        kv_range: int ``[B, 2]``, first and one-past-last valid key of each batch row; by default all keys. Queries that
            stand outside it are padding; their output is 0.
        scale: Softmax scale; by default ``D ** -0.5``.
        key_codes: A `KeyCodes`, which keeps codes of keys from chunk to chunk of a prompt: the same blocks are chosen,
            and only new keys are coded. Beside it `q_offset` must be an int or left out.
        return_lse: Also return the log-sum-exp of every row over what it kept, in nats, without the sink logit.
        stats: Also return what was kept and which path ran.
        kernel_options: Options for flex_attention, over those of `flex_kernel_options`.

    Returns:
        ``[B, Hq, Sq, D]`` in the query's dtype, or autocast's. With ``stats=True`` a `SaleResult`, with
        ``return_lse=True`` a `LseResult`, with both a `LseStatsResult`. On a CPU the log-sum-exp, and so `sink_logits`,
        take a slower path of plain torch: torch's CPU kernel for flex_attention has none.

    Raises:
        TypeError, ValueError: An argument breaks its rule; the message names both.
        NotImplementedError: The estimate can not follow an operation of a mod; or a gradient is wanted where torch
            can not compute it, on a CPU or for small blocks before torch 2.14; or `key_codes` under torch.compile.
    """
    mods = UserMods(score_mod, mask_mod, block_mask, causal, estimate_mods)
    query, key, value = autocast_inputs(query, key, value)
    with without_autocast(query):
        return _attend(
            query,
            key,
            value,
            config,
            mods,
            sink_logits,
            q_offset,
            kv_range,
            scale,
            key_codes,
            return_lse,
            stats,
            kernel_options,
        )


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: SaleConfig,
    mods: UserMods,
    sink_logits: Tensor | None,
    q_offset: int | Tensor | None,
    kv_range: Tensor | None,
    scale: float | None,
    key_codes: KeyCodes | None,
    return_lse: bool,
    stats: bool,
    kernel_options: dict[str, Any] | None,
) -> Tensor | SaleResult | LseResult | LseStatsResult:
    """`sale_attention`, its mods gathered, its inputs of the dtype in which it computes."""
    scale = settled(scale)
    check_inputs(query, key, value, config, q_offset, kv_range, scale)
    if not mods.plain:
        check_mods(query, key, mods, config)
    if sink_logits is not None:
        check_sinks(sink_logits, query)
    reuse = reuse_of(key_codes, query, key, q_offset)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    min_length = early_rows(query, config)
    wants_lse = return_lse or sink_logits is not None
    plain = mods.plain and not wants_lse
    square = q_offset is None and kv_range is None and query.shape[2] == key.shape[2]
    mark(None, query.device)
    reason = _dense_reason(query, key, config.block_size[0], min_length)
    if reason is not None and plain and _fits_sdpa(query, key, q_offset is None and kv_range is None):
        bounds = None if square and not stats else make_bounds(query, key, q_offset, kv_range)
        output = dense_sdpa(query, key, value, None if square else bounds, scale)
        mark("attention", query.device)
        if bounds is None or not stats:
            return output
        grid = Grid(query.shape[2], key.shape[2], *config.block_size)
        return SaleResult(output, dense_stats(bounds, query.shape[1], grid, f"dense sdpa: {reason}"))

    backward = wants_grad(query, key, value, sink_logits)
    if backward:
        check_backward(query, config.block_size)
    bounds = make_bounds(query, key, q_offset, kv_range)
    # Torch's CPU kernel for flex_attention knows no log-sum-exp.
    by_rows = wants_lse and query.device.type == "cpu"
    # Our own program goes to Inductor, which follows block indices. So may a caller's torch.compile; if it does not,
    # flex_attention may be computed densely under its mask_mod, which then has to know the kept blocks.
    lookup = by_rows
    if torch.compiler.is_compiling():
        from sale_flex.compiler import inductor_is_tracing  # here: it imports torch._dynamo, and that Triton

        lookup = lookup or not inductor_is_tracing()
    # Whole blocks of early rows are dense, and where no padding is in the way SDPA computes them faster. Not in a
    # caller's program: Inductor's C++ template for flex_attention lets nothing write into its output.
    early = 0
    if square and plain and reason is None and not backward and not torch.compiler.is_compiling():
        early = rows_of_early_blocks(min_length, config.block_size[0], query.shape[2])
    built = build_block_mask(
        query,
        key,
        value,
        mods,
        bounds,
        kv_range is None,
        scale,
        config,
        lookup,
        leave_early=early > 0,
        backward=backward,
        dense=None if plain else reason,
        reuse=reuse,
        wants_audit=stats,
    )
    counts = built.counts
    mark("mask", query.device)
    lse = None
    if by_rows:
        output, lse = attend_rows(query, key, value, built.kept, mods, bounds, config.block_size, scale)
    else:
        output, lse = run_flex(
            query,
            key,
            value,
            built.block_mask,
            scale,
            kernel_options,
            mods.score_mod,
            wants_lse,
            backward,
            not mods.plain,
        )
    del built  # its lists are the largest thing that the call allocates
    if sink_logits is not None and lse is not None:
        output = with_sinks(output, lse, sink_logits)
    if early:
        output[:, :, :early] = dense_sdpa(query[:, :, :early], key[:, :, :early], value[:, :, :early], None, scale)
    mark("attention", query.device)
    if not stats:
        return LseResult(output, lse) if return_lse and lse is not None else output
    kept = with_dense_rows(counts(), bounds, Grid(early, key.shape[2], *config.block_size)) if early else counts()
    if by_rows:
        kept = kept._replace(path=kept.path.replace("flex", "torch rows"))
    return LseStatsResult(output, lse, kept) if return_lse and lse is not None else SaleResult(output, kept)


def _dense_reason(query: Tensor, key: Tensor, block_q: int, min_length: int) -> str | None:
    """Why the call is dense by its lengths alone, or None. What the lengths do not tell, the block mask does."""
    if 2 * query.shape[2] < block_q:
        return "fewer queries than half a block"
    if key.shape[2] <= min_length:
        return "no more keys than min_length"
    return None


def _fits_sdpa(query: Tensor, key: Tensor, unpadded: bool) -> bool:
    """Whether dense attention needs no explicit mask, or one that is small."""
    q_len, kv_len = query.shape[2], key.shape[2]
    return (unpadded and q_len == kv_len) or q_len * kv_len <= _DENSE_MASK_LIMIT


def dense_sdpa(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor | None, scale: float) -> Tensor:
    """Dense causal attention; with `bounds`, through an explicit mask, and padding rows are 0."""
    grouped = query.shape[1] != key.shape[1]
    if bounds is None:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    offset, start, end = (bounds[:, n, None, None] for n in range(3))
    position = torch.arange(query.shape[2], device=query.device)[None, :, None] + offset
    at = torch.arange(key.shape[2], device=query.device)
    seen = (at >= start) & (at <= position) & (position < end)  # [B, Sq, Skv]
    output = scaled_dot_product_attention(query, key, value, attn_mask=seen[:, None], scale=scale, enable_gqa=grouped)
    padding = (position < start) | (position >= end)  # [B, Sq, 1]
    return output.masked_fill(padding[:, None], 0.0)
