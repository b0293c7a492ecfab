# SPDX-License-Identifier: BSD-3-Clause
"""The attention function of ``attn_implementation="sale_flex"``."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from sale_flex import mods
from sale_flex.attention import AuxRequest, sale_attention
from sale_flex.call.autocast import autocast_inputs, without_autocast
from sale_flex.clock import running
from sale_flex.config import SaleConfig
from sale_flex.integrations.transformers.caches import (
    ARGUMENT,
    cache_layer,
    codes_of,
    goes_on,
    refuse_paged,
    warn_without_cache,
)
from sale_flex.integrations.transformers.calls import AttentionCall
from sale_flex.integrations.transformers.dense import dense_step
from sale_flex.integrations.transformers.heads import pad_heads
from sale_flex.integrations.transformers.layers import (
    DECODE,
    DENSE,
    DENSE_CONFIG,
    SPARSE,
    LayerState,
    is_cross,
    state_of,
)
from sale_flex.integrations.transformers.masks import DENSE_QUERIES, ModelMask
from sale_flex.integrations.transformers.refused import refuse
from sale_flex.selection.key_codes import KeyCodes
from sale_flex.stats import SaleStats

_DEFAULT = SaleConfig()


def sale_flex_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' ``AttentionInterface``.

    Args:
        module: The attention module; `configure` left its `SaleConfig` there, otherwise the default is taken.
        query: ``[B, Hq, Sq, D]``; under tensor parallelism the heads of this process.
        key: ``[B, Hkv, Skv, D]``.
        value: ``[B, Hkv, Skv, Dv]``.
        attention_mask: From `sale_flex_mask`, or a mask tensor or BlockMask of the user's.
        scaling: Softmax scale; by default ``D ** -0.5``.
        dropout: Must be 0 in prefill.
        softcap: Of the logits, ``softcap * tanh(logits / softcap)``, if given.
        s_aux: Sink logits ``[Hq]``, if the model has them.
        is_causal: Whether a query sees no key behind its own position, if there is no mask; the module's by default.
        position_bias: Must be None in prefill.
        kwargs: Others of the model's, of which none changes what is computed here.

    Returns:
        ``[B, Sq, Hq, Dv]``, contiguous, and None for the attention weights. Rows that are padding are 0 in a causal
        prompt. Under autocast the dtype is that of scaled_dot_product_attention there.

    Raises:
        UnsupportedModelError: The model is one of those that are refused; a NotImplementedError and ValueError.
        NotImplementedError: Attention weights, dropout, a position bias or continuous batching are asked for.
    """
    _refuse_early(module, kwargs)
    index = getattr(module, "layer_idx", -1)
    # Before room is cut off: a cache's keys are known by being the very tensor.
    keys_of = None if torch.compiler.is_compiling() else cache_layer(kwargs, index, key)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    query, key, value = autocast_inputs(query, key, value)
    # On the meta device nothing happens that could be counted.
    state = None if query.is_meta else state_of(module)
    if state is not None and state.calls.device != query.device:
        state.move(query.device)
    if attention_mask is None and causal and 1 < query.shape[2] < key.shape[2]:
        # A static cache that was empty: the keys past the prompt are room.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    cross = is_cross(module)
    crossed = cross or (attention_mask is None and not causal and query.shape[2] != key.shape[2])
    few = query.shape[2] < DENSE_QUERIES
    if not isinstance(attention_mask, BlockMask) and (attention_mask is not None or crossed or few):
        kind = DECODE if few and not cross else DENSE
        _count(state, kind, "dense: cross-attention" if crossed else "dense: a mask tensor")
        output = dense_step(
            module, query, key, value, attention_mask, scaling, dropout, softcap, s_aux, causal, position_bias
        )
        return output, None
    _refuse_prefill(dropout, position_bias)
    options: dict[str, Any] = {"scale": query.shape[3] ** -0.5 if scaling is None else scaling}
    if isinstance(attention_mask, ModelMask):
        keys = attention_mask.looks.keys
        key, value = key[:, :, :keys], value[:, :, :keys]
        options |= attention_mask.options
    elif attention_mask is not None:
        options |= {"block_mask": attention_mask, "is_causal": False}
    elif not causal:
        options["is_causal"] = False
    if softcap is not None:
        options["score_mod"] = mods.softcap(softcap)
    if s_aux is not None:
        options["sink_logits"] = s_aux
    width = value.shape[3]
    query, key, value = pad_heads(query, key, value)
    if cross:  # as many queries as keys, of which some are padding
        _count(state, DENSE, "dense: cross-attention")
        return _returned(sale_attention(query, key, value, DENSE_CONFIG, **options), width), None
    looks = attention_mask.looks if isinstance(attention_mask, ModelMask) else None
    if state is not None and ARGUMENT not in kwargs and goes_on(looks) and not torch.compiler.is_compiling():
        warn_without_cache(module)
    output = _attend(state, AttentionCall(index, query, key, value, options), codes_of(keys_of, looks))
    return _returned(output, width), None


def _returned(output: Any, width: int) -> Tensor:
    """As transformers wants it, ``[B, Sq, Hq, Dv]``."""
    return output[..., :width].transpose(1, 2).contiguous()


def _attend(state: LayerState | None, call: AttentionCall, codes: KeyCodes | None) -> Tensor:
    if state is None:
        return sale_attention(call.query, call.key, call.value, _DEFAULT, **call.options)
    if state.observer is not None:
        with without_autocast(call.query):
            return state.observer(call)
    inputs = (call.query, call.key, call.value, state.config)
    wanted = AuxRequest(stats=True)
    if torch.compiler.is_compiling():
        output, aux = sale_attention(*inputs, return_aux=wanted, **call.options)
    else:
        with running(state.clock):
            output, aux = sale_attention(*inputs, return_aux=wanted, key_codes=codes, **call.options)
    stats = aux.stats
    assert stats is not None
    _count(state, DENSE if stats.ran_dense else SPARSE, stats)
    missed = stats.audit
    counts = (stats.kept_blocks, stats.visible_blocks, stats.dropped_blocks, missed.rows, missed.made_dense)
    state.blocks.add_(torch.stack(counts).sum(1))
    state.masses.add_(torch.stack((missed.wanted_mass, missed.missed_mass, missed.missed_squares)).sum(1))
    return output


def _count(state: LayerState | None, kind: int, ran: SaleStats | str) -> None:
    if state is None:
        return
    state.calls[kind].add_(1)
    if kind != DECODE and not torch.compiler.is_compiling():
        state.paths[ran if isinstance(ran, str) else ran.describe()] += 1


def _refuse_early(module: torch.nn.Module, kwargs: dict[str, Any]) -> None:
    config = getattr(module, "config", None)
    refuse(config)
    of_model = getattr(config, "output_attentions", False)
    if of_model or kwargs.get("output_attentions"):
        raise NotImplementedError(
            "attn_implementation='sale_flex' computes no attention weights (output_attentions); load the model with "
            "attn_implementation='eager' to see them."
        )
    refuse_paged(kwargs)


def _refuse_prefill(dropout: float, position_bias: Tensor | None) -> None:
    if dropout:
        raise NotImplementedError(
            f"attn_implementation='sale_flex' has no attention dropout, got {dropout}; call model.eval(), or set "
            "model.config.attention_dropout to 0."
        )
    if position_bias is not None:
        raise NotImplementedError(
            "attn_implementation='sale_flex' takes no position_bias tensor; a bias of relative positions can be a "
            "score_mod of sale_attention (sale_flex.mods.relative_bias)."
        )
