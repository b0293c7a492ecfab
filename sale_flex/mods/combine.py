# SPDX-License-Identifier: BSD-3-Clause
"""Masks of masks, which keep what is known of where their keys lie."""

from collections.abc import Callable

from torch import Tensor

from sale_flex.mods.placed import following, follows_call, placed_in_call, placed_mask
from sale_flex.mods.ready import KeyRange, MaskMod, ready


def and_masks(*mask_mods: MaskMod) -> MaskMod:
    """A row sees the keys that all of the masks show.

    Like torch's, with a key range: what the ranges of those masks that have one share.

    Example:
        ``mask_mod=and_masks(causal(), document(ids))``
    """
    return _combined(_both, _checked("and_masks", mask_mods))


def or_masks(*mask_mods: MaskMod) -> MaskMod:
    """A row sees the keys that at least one of the masks shows.

    Like torch's, with a key range if all masks have one: from the lowest to the highest key of any of them.

    Example:
        ``mask_mod=or_masks(sliding_window(1024), prefix_lm(16))``
    """
    return _combined(_either, _checked("or_masks", mask_mods))


def with_key_range(mask_mod: MaskMod, key_range: KeyRange) -> MaskMod:
    """`mask_mod` with a promise of where its keys lie, which saves sale_attention the look elsewhere.

    Args:
        mask_mod: Any mask mod. It is not changed.
        key_range: ``key_range(b, h, first_q, last_q) -> (first_kv, last_kv)``: rows `first_q` to `last_q` (rows of the
            query tensor, both included) see no key outside ``[first_kv, last_kv]``. Written like a mask mod, with 0-d
            integer tensors: sums, products, floor divisions, minima, maxima, and indexing of captured tensors. The
            range may reach over the ends of the tensor. The promise is not checked: a key that the mask shows outside
            the range may be lost.

    Example:
        ``with_key_range(same_page, lambda b, h, first_q, last_q: (first_q // 512 * 512, last_q // 512 * 512 + 511))``
        for a `same_page` that returns ``q_idx // 512 == kv_idx // 512``
    """
    for name, value in (("mask_mod", mask_mod), ("key_range", key_range)):
        if not callable(value):
            raise TypeError(f"{name} must be a function, got {type(value).__name__}.")

    def ranged_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return mask_mod(b, h, q_idx, kv_idx)

    ranged = ready(ranged_mask, key_range=key_range)
    return placed_mask(ranged, None) if follows_call(mask_mod) else ranged


def _combined(combine: Callable[[MaskMod, MaskMod], MaskMod], mask_mods: tuple[MaskMod, ...]) -> MaskMod:
    combined, *others = mask_mods
    if not others:
        return combined
    for other in others:
        combined = combine(combined, other)
    if not any(follows_call(mask_mod) for mask_mod in mask_mods):
        return combined
    # Those with an offset of their own keep it.
    return following(combined, lambda at: _combined(combine, tuple(placed_in_call(each, at) for each in mask_mods)))


def _checked(name: str, mask_mods: tuple[MaskMod, ...]) -> tuple[MaskMod, ...]:
    if not mask_mods:
        raise ValueError(f"{name} needs at least one mask_mod, got none.")
    for place, mask_mod in enumerate(mask_mods):
        if not callable(mask_mod):
            raise TypeError(f"{name} takes mask_mods, got {type(mask_mod).__name__} at place {place}.")
    return mask_mods


# Two at a time, so that a closure captures functions and no tuple of them.
def _both(first: MaskMod, second: MaskMod) -> MaskMod:
    def both(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return first(b, h, q_idx, kv_idx) & second(b, h, q_idx, kv_idx)

    first_range: KeyRange | None = getattr(first, "key_range", None)
    second_range: KeyRange | None = getattr(second, "key_range", None)
    if first_range is None or second_range is None:
        return ready(both, key_range=first_range or second_range)
    one, other = first_range, second_range

    def shared(b: Tensor, h: Tensor, first_q: Tensor, last_q: Tensor) -> tuple[Tensor | int, Tensor | int]:
        one_first, one_last = one(b, h, first_q, last_q)
        other_first, other_last = other(b, h, first_q, last_q)
        return _higher(one_first, other_first), _lower(one_last, other_last)

    return ready(both, key_range=shared)


def _either(first: MaskMod, second: MaskMod) -> MaskMod:
    def either(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return first(b, h, q_idx, kv_idx) | second(b, h, q_idx, kv_idx)

    first_range: KeyRange | None = getattr(first, "key_range", None)
    second_range: KeyRange | None = getattr(second, "key_range", None)
    if first_range is None or second_range is None:
        return ready(either)
    one, other = first_range, second_range

    def hull(b: Tensor, h: Tensor, first_q: Tensor, last_q: Tensor) -> tuple[Tensor | int, Tensor | int]:
        one_first, one_last = one(b, h, first_q, last_q)
        other_first, other_last = other(b, h, first_q, last_q)
        return _lower(one_first, other_first), _higher(one_last, other_last)

    return ready(either, key_range=hull)


def _lower(one: Tensor | int, other: Tensor | int) -> Tensor | int:
    """The minimum of two integers, of which a user's key range may give either as an int."""
    if isinstance(one, Tensor):
        return one.minimum(other) if isinstance(other, Tensor) else one.clamp(max=other)
    return other.clamp(max=one) if isinstance(other, Tensor) else min(one, other)


def _higher(one: Tensor | int, other: Tensor | int) -> Tensor | int:
    """The maximum, likewise."""
    if isinstance(one, Tensor):
        return one.maximum(other) if isinstance(other, Tensor) else one.clamp(min=other)
    return other.clamp(min=one) if isinstance(other, Tensor) else max(one, other)
