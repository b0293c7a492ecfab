# SPDX-License-Identifier: BSD-3-Clause
"""`sale_attention`: block mask and compiled attention in one call, or dense attention where that is what is asked."""

from typing import Any, NamedTuple, TypedDict, Unpack, overload

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention

from sale_flex.call.autocast import autocast_inputs, without_autocast
from sale_flex.call.break_even import rows_of_dense_blocks
from sale_flex.call.facts import Arguments, check_arguments, make_bounds, settle, wants_grad
from sale_flex.call.stages import build
from sale_flex.call.user_mods import UserMods
from sale_flex.clock import mark
from sale_flex.config import SaleConfig
from sale_flex.flex.run import check_backward, run_flex
from sale_flex.flex.sinks import attend_rows, check_sinks, with_sinks
from sale_flex.mods import MaskMod, ScoreMod
from sale_flex.selection.key_codes import KeyCodes
from sale_flex.stats import SaleStats, dense_stats

_DENSE_MASK_LIMIT = 2**22
"""Elements of an explicit mask that the dense shortcut may build per batch row; above, the block path runs."""


class AuxRequest(NamedTuple):
    """What a call is to return beside its output."""

    lse: bool = False
    """The log-sum-exp of every row."""
    stats: bool = False
    """What was kept, and what ran."""


class AuxOutput(NamedTuple):
    """What was asked for by an `AuxRequest`; the rest is None."""

    lse: Tensor | None = None
    """float32 ``[B, Hq, Sq]``: natural logarithm of the sum of exponentials over the kept set; -inf for none."""
    stats: SaleStats | None = None


class AttentionOptions(TypedDict, total=False):
    """The options of `sale_attention` whose types do not change its result."""

    score_mod: ScoreMod | None
    mask_mod: MaskMod | None
    block_mask: BlockMask | None
    is_causal: bool
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
    return_aux: None = ...,
    **options: Unpack[AttentionOptions],
) -> Tensor: ...
@overload
def sale_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: SaleConfig = ...,
    *,
    return_aux: AuxRequest,
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, AuxOutput]: ...
def sale_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: SaleConfig = SaleConfig(),  # noqa: B008 - frozen
    *,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    block_mask: BlockMask | None = None,
    is_causal: bool = True,
    estimate_mods: str = "apply",
    sink_logits: Tensor | None = None,
    q_offset: int | Tensor | None = None,
    kv_range: Tensor | None = None,
    scale: float | None = None,
    key_codes: KeyCodes | None = None,
    return_aux: AuxRequest | None = None,
    kernel_options: dict[str, Any] | None = None,
) -> Tensor | tuple[Tensor, AuxOutput]:
    """Attention on the blocks that a low-bit estimate keeps.

    Short prompts (no more keys than ``config.min_length``) and decoding steps (fewer queries than half a block) are
    dense by definition; `SaleStats` says so. Where nothing but causality is asked they run
    scaled_dot_product_attention. Everything else builds a block mask and runs compiled flex_attention on it.

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
        is_causal: Whether a query sees no key behind its own position. False leaves that to the masks.
        estimate_mods: ``"ignore"`` leaves the mods out of the estimate, but not out of attention.
        sink_logits: float ``[Hq]``: a logit per head that takes its share of every row's softmax and has no value, as
            in gpt-oss. The estimate leaves it out: a block's share is of what the tokens get.
        q_offset: Key index of the first query: an int, or an integer tensor ``[]`` or, for rows that stand at different
            places, ``[B]``; by default ``Skv - Sq``.
        kv_range: int ``[B, 2]``, first and one-past-last valid key of each batch row; by default all keys. Queries that
            stand outside it are padding; their output is 0.
        scale: Softmax scale; by default ``D ** -0.5``.
        key_codes: A `KeyCodes`, which keeps codes of keys from chunk to chunk of a prompt: the same blocks are chosen,
            and only new keys are coded. Beside it `q_offset` must be an int or left out.
        return_aux: What to return besides: the log-sum-exp of every row over what it kept, in nats, without the sink
            logit; what was kept and what ran.
        kernel_options: Options for flex_attention, over those of `flex_kernel_options`.

    Returns:
        ``[B, Hq, Sq, D]`` in the query's dtype, or autocast's; with `return_aux` a pair of it and an `AuxOutput`. On a
        CPU the log-sum-exp, and so `sink_logits`, take a slower path of plain torch: torch's CPU kernel for
        flex_attention has none.

    Raises:
        TypeError, ValueError: An argument breaks its rule; the message names both.
        NotImplementedError: The estimate can not follow an operation of a mod; or a gradient is wanted where torch
            can not compute it, on a CPU or for small blocks before torch 2.14; or `key_codes` under torch.compile.
    """
    if return_aux is not None and not isinstance(return_aux, AuxRequest):
        raise TypeError(
            f"return_aux must be a sale_flex.AuxRequest or None, got {type(return_aux).__name__}; for instance "
            "AuxRequest(lse=True, stats=True)."
        )
    mods = UserMods(score_mod, mask_mod, block_mask, is_causal, estimate_mods)
    query, key, value = autocast_inputs(query, key, value)
    with without_autocast(query):
        given = check_arguments(query, key, value, config, mods, q_offset, kv_range, scale, key_codes)
        if sink_logits is not None:
            check_sinks(sink_logits, query)
        output, aux = _attend(given, value, sink_logits, return_aux or AuxRequest(), kernel_options)
        return output if return_aux is None else (output, aux)


def _attend(
    given: Arguments,
    value: Tensor,
    sink_logits: Tensor | None,
    wanted: AuxRequest,
    kernel_options: dict[str, Any] | None,
) -> tuple[Tensor, AuxOutput]:
    """`sale_attention` on checked arguments."""
    query, key, config = given.query, given.key, given.config
    wants_lse = wanted.lse or sink_logits is not None
    plain = given.mods.plain and not wants_lse
    mark(None, query.device)
    reason = _dense_reason(given)
    if reason is not None and plain and _fits_sdpa(given):
        return _attend_densely(given, value, reason, wanted.stats)
    backward = wants_grad(query, key, value, sink_logits)
    if backward:
        check_backward(query, config.block_size)
    # Torch's CPU kernel for flex_attention knows no log-sum-exp.
    by_rows = wants_lse and query.device.type == "cpu"
    # Our own program goes to Inductor, which follows block indices. So may a caller's torch.compile; if it does not,
    # flex_attention may be computed densely under its mask_mod, which then has to know the kept blocks.
    lookup = by_rows
    if torch.compiler.is_compiling():
        from sale_flex.flex.compiler import inductor_is_tracing  # here: it imports torch._dynamo, and that Triton

        lookup = lookup or not inductor_is_tracing()
    # Whole blocks of the dense prefix are computed faster by SDPA where no padding is in the way. Not in a caller's
    # program: Inductor's C++ template for flex_attention lets nothing write into its output.
    apart = 0
    if given.square and plain and reason is None and not backward and not torch.compiler.is_compiling():
        apart = rows_of_dense_blocks(given.dense_prefix, config.block_size[0], query.shape[2])
    call = settle(
        given,
        dense=None if plain else reason,
        lookup=lookup,
        rows_apart=apart,
        backward=backward,
        wants_audit=wanted.stats,
    )
    built = build(call)
    counts = built.counts
    mark("mask", query.device)
    lse = None
    if by_rows:
        output, lse = attend_rows(call, value, built.kept)
    else:
        output, lse = run_flex(
            query,
            key,
            value,
            built.block_mask,
            call.scale,
            kernel_options,
            call.mods.score_mod,
            wants_lse,
            backward,
            not call.mods.plain,
        )
    del built  # its lists are the largest thing that the call allocates
    if sink_logits is not None and lse is not None:
        output = with_sinks(output, lse, sink_logits)
    if apart:
        output[:, :, :apart] = dense_sdpa(query[:, :, :apart], key[:, :, :apart], value[:, :, :apart], None, call.scale)
    mark("attention", query.device)
    stats = counts() if wanted.stats else None
    if stats is not None and by_rows:
        stats = stats._replace(path=stats.path.by_rows)
    return output, AuxOutput(lse if wanted.lse else None, stats)


def _attend_densely(given: Arguments, value: Tensor, reason: str, wants_stats: bool) -> tuple[Tensor, AuxOutput]:
    """Plain causal attention by scaled_dot_product_attention."""
    query, key = given.query, given.key
    bounds = None
    if wants_stats or not given.square:
        bounds = make_bounds(query, key, given.q_offset, given.kv_range)
    output = dense_sdpa(query, key, value, None if given.square else bounds, given.scale)
    mark("attention", query.device)
    if bounds is None or not wants_stats:
        return output, AuxOutput()
    return output, AuxOutput(stats=dense_stats(bounds, query.shape[1], given.grid, reason))


def _dense_reason(given: Arguments) -> str | None:
    """Why the call is dense by its lengths alone, or None. What the lengths do not tell, the block mask does."""
    if 2 * given.query.shape[2] < given.config.block_size[0]:
        return "fewer queries than half a block"
    if given.key.shape[2] <= given.dense_prefix:
        return "no more keys than min_length"
    return None


def _fits_sdpa(given: Arguments) -> bool:
    """Whether dense attention needs no explicit mask, or one that is small."""
    return given.square or given.query.shape[2] * given.key.shape[2] <= _DENSE_MASK_LIMIT


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
