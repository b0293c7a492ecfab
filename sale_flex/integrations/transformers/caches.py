# SPDX-License-Identifier: BSD-3-Clause
"""A model's KV caches: known by what they are, and followed from call to call for the codes of their keys.

Releases of transformers name the argument of an attention module that is its cache differently. So it is looked for
among all arguments, before the module writes new keys, and handed on to the attention function.
"""

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache

from sale_flex.integrations.transformers.kept_codes import KeptCodes
from sale_flex.integrations.transformers.masks import Looks
from sale_flex.selection.key_codes import KeyCodes

ARGUMENT = "sale_flex_caches"
"""Name under which an attention module hands its KV caches to the attention function, a tuple."""

_NAMES = ("cache", "past_key_values")
"""What transformers calls a cache: what has such a name and is none that is known is refused, not overlooked."""

_KEPT = "_sale_flex_codes"
"""Attribute of a cache's layer: its `KeptCodes`."""


def hand_over_cache(module: torch.nn.Module) -> None:
    """Let the attention function see the KV cache: modules pass it extra keyword arguments, those that take any."""
    kinds = {parameter.kind for parameter in inspect.signature(module.forward).parameters.values()}
    if inspect.Parameter.VAR_KEYWORD in kinds:
        module.register_forward_pre_hook(_add_caches, with_kwargs=True)


def _add_caches(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if torch.compiler.is_compiling():
        return None
    refuse_paged(kwargs)
    caches = tuple(_caches_among((*args, *kwargs.values())))
    if not caches:
        return None
    for _, layer in _layers_of(caches, getattr(module, "layer_idx", None)):
        kept = getattr(layer, _KEPT, None)
        if kept is not None:
            kept.look(layer)
    return args, kwargs | {ARGUMENT: caches}


def _caches_among(values: Iterable[Any]) -> Iterator[Cache]:
    for value in values:
        if isinstance(value, EncoderDecoderCache):
            yield from (value.self_attention_cache, value.cross_attention_cache)
        elif isinstance(value, Cache):
            yield value


def _layers_of(caches: Iterable[Cache], index: int | None) -> Iterator[tuple[Cache, Any]]:
    """Each cache with its layer of this index, of those that have one."""
    for cache in caches:
        layers = getattr(cache, "layers", ())
        if isinstance(index, int) and 0 <= index < len(layers):
            yield cache, layers[index]


def refuse_paged(kwargs: Mapping[str, Any]) -> None:
    """Refuse the caches of continuous batching, whose keys of many requests are in one row, and those nobody knows.

    Args:
        kwargs: Keyword arguments of an attention module or of the attention function.

    Raises:
        NotImplementedError: One of them is such a cache.
    """
    for name, value in kwargs.items():
        if value is None or isinstance(value, (Tensor, Cache)):
            continue
        if _is_paged(value) or (name in _NAMES and not _looks_like_a_cache(value)):
            raise NotImplementedError(
                "attn_implementation='sale_flex' has no continuous batching (a paged cache), and takes the caches of "
                f"transformers, got {name} of type {type(value).__name__}; use model.generate, or "
                "attn_implementation='sdpa'."
            )


def _is_paged(value: Any) -> bool:
    return all(callable(getattr(value, name, None)) for name in ("update", "free_blocks", "fill_block_table"))


def _looks_like_a_cache(value: Any) -> bool:
    return all(callable(getattr(value, name, None)) for name in ("update", "get_seq_length"))


def cache_layer(kwargs: Mapping[str, Any], index: int, key: Tensor) -> Any:
    """The cache layer that handed out a call's keys, once the call's own keys are in it; None where there is none.

    To be called once in every call, decoding steps too, so that codes stay with the keys they were made from.

    Args:
        kwargs: Keyword arguments of the attention function.
        index: The attention layer's index.
        key: ``[B, Hkv, Skv, D]``, as it came.
    """
    for cache, layer in _layers_of(kwargs.get(ARGUMENT, ()), index):
        if getattr(layer, "keys", None) is key:
            if not hasattr(layer, _KEPT):
                setattr(layer, _KEPT, KeptCodes())
            getattr(layer, _KEPT).follow(cache, layer)
            return layer
    return None


def codes_of(layer: Any, looks: Looks | None) -> KeyCodes | None:
    """The store of a cache layer's keys for this call; None where it is of no use.

    A prompt that is read in one go needs none, so the first chunk stores nothing: the second codes it once more. Caches
    that drop or change keys, and offsets that the host does not know, have none.

    Args:
        layer: The layer of a cache, or None.
        looks: What the call sees; None for a whole prompt.
    """
    if layer is None:
        return None
    kept: KeptCodes = getattr(layer, _KEPT)
    padding = None if looks is None else looks.padding
    if looks is None or not goes_on(looks) or (padding is not None and padding.ranges is None):
        kept.drop()
        return None
    whole = ((0, looks.keys),) * layer.keys.shape[0]
    return kept.codes_for(whole if padding is None or padding.ranges is None else padding.ranges)


def goes_on(looks: Looks | None) -> bool:
    """Whether the call is a later chunk, at a place that the host knows, with all keys before it."""
    if looks is None:
        return False
    q_offset, kv_offset = looks.q_offset, looks.kv_offset
    return isinstance(q_offset, int) and q_offset > 0 and isinstance(kv_offset, int) and kv_offset == 0


def warn_without_cache(module: torch.nn.Module) -> None:
    """Say that a later chunk of a prompt came without the cache that its first keys are in."""
    warnings.warn(
        f"attn_implementation='sale_flex' finds no KV cache of transformers among the arguments of "
        f"{type(module).__name__}.forward, though the call goes on behind cached keys: the same blocks are chosen, but "
        "all keys are coded again with every chunk. A module hands its cache over if it takes **kwargs and passes them "
        "on to its attention function.",
        stacklevel=3,
    )


def stores_of(cache: Cache) -> dict[int, KeyCodes]:
    """The stores that a KV cache has, layer index -> `KeyCodes`."""
    (cache, *_) = _caches_among([cache])
    kept = {index: getattr(layer, _KEPT, None) for index, layer in enumerate(cache.layers)}
    return {index: one.codes for index, one in kept.items() if one is not None}
