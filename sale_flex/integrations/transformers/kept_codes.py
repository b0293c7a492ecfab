# SPDX-License-Identifier: BSD-3-Clause
"""Codes of keys that live and die with the KV cache that holds the keys.

Whether the keys of a cache are those that were coded is known on the host, without waiting for the device: a tensor
that is the same object and has the same version was not written to. What a cache does with its keys (reorder, select,
repeat, reset, move, convert, load) makes another tensor or another version, whoever does it, and however it is called.
"""

import copy
from typing import Any

from torch import Tensor
from torch.utils.weak import TensorWeakRef
from transformers import Cache
from transformers.cache_utils import DynamicLayer, StaticLayer

from sale_flex.selection.key_codes import KeyCodes

Ranges = tuple[tuple[int, int], ...]
"""First and one-past-last valid position of every batch row."""


class KeptCodes:
    """Codes of the keys of a cache's layer; an attribute of that layer.

    A call first looks at the layer, before its own keys are there, and follows it afterwards. In between the layer's
    own `update` must be all that happens, so codes are kept of layers whose `update` is known to leave old keys alone.

    A copy of a cache has a store of its own; one that was pickled has an empty one.
    """

    def __init__(self) -> None:
        self._codes = KeyCodes(renew=True)
        self._seen: tuple[tuple[TensorWeakRef, int | None], ...] = ()
        self._looked = False
        self._appends = False
        self._ranges: Ranges = ()

    @property
    def codes(self) -> KeyCodes:
        """The store."""
        return self._codes

    def drop(self) -> None:
        """Forget all codes."""
        self._codes.clear()

    def look(self, layer: Any) -> None:
        """Before a call: forget the codes of keys that are not the layer's any more."""
        self._looked = True
        now = _watched(layer)
        seen = [(reference(), version) for reference, version in self._seen]
        if len(now) != len(seen) or not now:
            self.drop()
        elif any(tensor is not old or _version(tensor) != version for tensor, (old, version) in zip(now, seen)):
            keys, (before, version) = now[0], seen[0]
            if len(now) == 1 and before is not None and _version(keys) == version and _is_shorter(keys, before):
                self._codes.truncate(keys.shape[2])
            else:
                self.drop()

    def follow(self, cache: Cache, layer: Any) -> None:
        """In a call, when its keys are written and handed out as they are."""
        update = getattr(layer.update, "__func__", None)
        in_place = update is StaticLayer.update
        self._appends = getattr(cache.update, "__func__", None) is Cache.update and (
            update is DynamicLayer.update or (in_place and not any(x.is_inference() for x in _watched(layer)))
        )
        if not (self._looked and self._appends):
            self.drop()
        self._looked = False
        self._seen = tuple((TensorWeakRef(tensor), _version(tensor)) for tensor in _watched(layer))

    def codes_for(self, ranges: Ranges) -> KeyCodes | None:
        """The store for a call that sees keys as `ranges` says; None if the layer may change keys it has."""
        if not self._appends:
            return None
        known = self._codes.length
        if known:
            if [start for start, _ in ranges] != [start for start, _ in self._ranges]:
                self.drop()
            for (_, end), (_, before) in zip(ranges, self._ranges):
                # A row whose padding ended inside of what is stored and that goes on now, or the other way round.
                if min(end, known) != min(before, known):
                    self._codes.truncate(min(end, before))
        self._ranges = ranges
        self._codes.first_valid = max(start for start, _ in ranges)
        return self._codes

    def __deepcopy__(self, memo: dict[int, Any]) -> "KeptCodes":
        other = KeptCodes()
        seen = [(reference(), version) for reference, version in self._seen]
        if all(tensor is not None and _version(tensor) == version for tensor, version in seen):
            # The copies are the copied layer's own: both ask `memo` for them.
            copies = [copy.deepcopy(tensor, memo) for tensor, _ in seen]
            other._seen = tuple((TensorWeakRef(tensor), _version(tensor)) for tensor in copies)
            other._codes, other._ranges = copy.deepcopy(self._codes, memo), self._ranges
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        return KeptCodes, ()


def _watched(layer: Any) -> list[Tensor]:
    """The tensors that say which keys a layer has, the keys first; empty if it has none."""
    length = getattr(layer, "cumulative_length", None)
    tensors = [layer.keys, *([length] if isinstance(length, Tensor) else [])]
    return tensors if isinstance(layer.keys, Tensor) else []


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was written to; None where torch does not count it, of tensors made under inference_mode."""
    return None if tensor.is_inference() else tensor._version


def _is_shorter(keys: Tensor, before: Tensor) -> bool:
    """Whether keys are the first of those that were there before: a view, not a copy."""
    batch, heads, length, dim = before.shape
    return (
        keys._base is before
        and keys.shape[:2] == (batch, heads)
        and keys.shape[2] <= length
        and keys.shape[3] == dim
        and keys.stride() == before.stride()
        and keys.storage_offset() == before.storage_offset()
    )
