# SPDX-License-Identifier: BSD-3-Clause
"""Codes of earlier chunks' keys, kept with the KV cache that holds the keys."""

import inspect
from typing import Any

import torch

from sale_flex.integrations.transformers.masks import Looks
from sale_flex.key_codes import KeyCodes

ARGUMENT = "sale_flex_cache"
"""Name under which an attention module hands its KV cache to the attention function."""

_CODES = "_sale_flex_codes"
"""Attribute of a cache: layer index -> `KeyCodes`."""


def hand_over_cache(module: torch.nn.Module) -> None:
    """Let the attention function see the KV cache: modules pass it extra keyword arguments, those that take any."""
    kinds = {parameter.kind for parameter in inspect.signature(module.forward).parameters.values()}
    if inspect.Parameter.VAR_KEYWORD in kinds:
        module.register_forward_pre_hook(_add_cache, with_kwargs=True)


def _add_cache(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    cache = kwargs.get("past_key_values")
    if cache is None or torch.compiler.is_compiling():
        return None
    return args, kwargs | {ARGUMENT: cache}


def stores_of(cache: Any) -> dict[int, KeyCodes]:
    """The stores of a KV cache, layer index -> `KeyCodes`."""
    stores: dict[int, KeyCodes] | None = getattr(cache, _CODES, None)
    if stores is None:
        stores = {}
        setattr(cache, _CODES, stores)
    return stores


def codes_of(cache: Any, layer: int, looks: Looks | None) -> KeyCodes | None:
    """The store of a layer for this call; None where it is of no use.

    A prompt that is read in one go needs none, so the first chunk stores nothing: the second codes it once more. Caches
    that dropped keys, and offsets that the host does not know, have none.

    Args:
        cache: The KV cache.
        layer: The layer's index.
        looks: What the call sees; None for a whole prompt.
    """
    first_valid = 0 if looks is None or looks.padding is None else looks.padding.first_valid
    stores = stores_of(cache)
    if looks is None or not _goes_on(looks) or first_valid is None:
        stores.pop(layer, None)
        return None
    store = stores.setdefault(layer, KeyCodes(first_valid))
    store.first_valid = first_valid
    return store


def _goes_on(looks: Looks) -> bool:
    """Whether the call is a later chunk, at a place that the host knows, with all keys before it."""
    q_offset, kv_offset = looks.q_offset, looks.kv_offset
    return isinstance(q_offset, int) and q_offset > 0 and isinstance(kv_offset, int) and kv_offset == 0
