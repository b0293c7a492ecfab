# SPDX-License-Identifier: BSD-3-Clause
"""Neighborhood attention: the nearest tokens on a grid of one, two, three axes.

The window of coordinate `x` on an axis of length `L`, with `w` neighbours at dilation `d`: they lie in the dilation
group of `x`, the coordinates that leave the same remainder by `d`. The first of them would be ``x - d * (w // 2)``.
Where that is before the group's first coordinate, ``x % d``, it is this one; and where the window would end behind the
axis, it is ``L - d * w + (x - L) % d``, the last from which the window ends inside. All three are in the group of `x`,
so to clamp coordinates is to clamp places in the group.
"""

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

from sale_flex.mods.arguments import checked_count
from sale_flex.mods.combine import and_masks
from sale_flex.mods.placed import placed_mask
from sale_flex.mods.ready import MaskMod, ready

Number = TypeVar("Number", int, bool)


def neighborhood(
    shape: int | Sequence[int],
    window: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    *,
    q_offset: int | Tensor | None = None,
) -> MaskMod:
    """Tokens on a grid see the `window` nearest tokens along each axis (Hassani et al. 2024, arXiv 2403.04690).

    The definition is that of NATTEN with stride 1. Along an axis of length `L` the coordinates that leave the same
    remainder by `dilation` are a group; a token at place `i` of a group of `n` sees the places from
    ``clamp(i - window // 2, 0, n - window)``, `window` of them: at a border the window is shifted, not cut. An even
    window reaches one place farther back than forward. On a causal axis the token sees the places from
    ``max(i - window + 1, 0)`` to `i`: fewer at the start. It sees a key if it does so along every axis.

    Tokens are in row-major order, the last axis the fastest. Rows outside the grid see nothing, and keys outside it are
    seen by none.

    Args:
        shape: Tokens along each axis; an int for one axis.
        window: Neighbours along each axis, the token itself among them; an int for the same along all.
        dilation: Distance of neighbours, in tokens of the axis; an int for the same along all.
        causal: Whether the axis is causal; a bool for all.
        q_offset: Place of query row 0 in the row-major order; None: that of the call (`sale_flex.mods`, "Positions").

    Raises:
        ValueError: If ``window * dilation`` is above the length of an axis, among others.

    Example:
        ``mask_mod=neighborhood((16, 48, 80), window=(3, 13, 13), causal=(True, False, False))``
    """
    if not isinstance(shape, (int, tuple, list)):
        raise TypeError(f"shape must be an int, or a tuple of ints, got {type(shape).__name__}.")
    lengths = (shape,) if isinstance(shape, int) else tuple(shape)
    if not lengths:
        raise ValueError("shape must have an axis, got an empty one.")
    windows = _per_axis("window", window, len(lengths), int)
    dilations = _per_axis("dilation", dilation, len(lengths), int)
    causals = _per_axis("causal", causal, len(lengths), bool)
    for axis, (length, width, step) in enumerate(zip(lengths, windows, dilations)):
        for name, number in (("shape", length), ("window", width), ("dilation", step)):
            checked_count(f"{name} of axis {axis}", number)
        if width * step > length:
            raise ValueError(
                f"window * dilation must be at most the length of the axis, got {width} * {step} for axis {axis} "
                f"of length {length}; make the window at most {length // step}, or the dilation smaller."
            )
    masks = []
    stride = 1
    for axis in reversed(range(len(lengths))):
        outer = axis == 0
        masks.append(_axis(lengths[axis], stride, windows[axis], dilations[axis], causals[axis], outer))
        stride *= lengths[axis]
    return placed_mask(and_masks(*reversed(masks)), q_offset)


def _per_axis(name: str, value: Number | Sequence[Number], axes: int, kind: type[Number]) -> tuple[Number, ...]:
    """`value` for each of the axes."""
    if isinstance(value, kind):
        return (value,) * axes
    word = f"{'an' if kind is int else 'a'} {kind.__name__}"
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} must be {word}, or {word} for each axis of shape, got {type(value).__name__}.")
    values = tuple(value)
    if len(values) != axes or not all(isinstance(number, kind) for number in values):
        raise ValueError(f"{name} must be {word}, or {word} for each of the {axes} axes of shape, got {values}.")
    return values


def _axis(length: int, stride: int, window: int, dilation: int, causal: bool, outer: bool) -> MaskMod:
    """The mask along one axis, on which neighbours are `stride` tokens apart.

    The outer axis has none above it: coordinates behind its end are seen as what they are. It has the key range.
    """
    reach = window * dilation
    before = reach - dilation if causal else window // 2 * dilation

    def axis_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        query, key = q_idx // stride, kv_idx // stride
        if not outer:
            query, key = query % length, key % length
        if causal:
            seen = (key <= query) & (key >= query - before)
        else:
            start = _first_neighbor(query, length, reach, before, dilation, causal)
            seen = (key >= start) & (key < start + reach)
        if dilation > 1:
            seen = seen & ((query - key) % dilation == 0)
        if outer:
            seen = seen & (query >= 0) & (query < length)
        return seen

    def key_range(b: Tensor, h: Tensor, first_q: Tensor, last_q: Tensor) -> tuple[Tensor, Tensor]:
        low = (first_q // stride).clamp(0, length - 1)
        high = (last_q // stride).clamp(0, length - 1)
        # From one coordinate to the next a window moves on by one, except that it may jump back where a new round of
        # groups begins, counted from either end of the axis. So the lowest window is that of the first coordinate or of
        # the first after such a place, and the highest that of the last coordinate or of the last before such a place.
        lowest, highest = [low], [high]
        if dilation > 1:
            lowest += [(low + (end - low) % dilation).minimum(high) for end in (0, length)]
            highest += [(high - (high + 1 - end) % dilation).maximum(low) for end in (0, length)]
        first = _first_neighbor(lowest[0], length, reach, before, dilation, causal)
        for x in lowest[1:]:
            first = first.minimum(_first_neighbor(x, length, reach, before, dilation, causal))
        if causal:
            return first * stride, high * stride + (stride - 1)
        last = _first_neighbor(highest[0], length, reach, before, dilation, causal)
        for x in highest[1:]:
            last = last.maximum(_first_neighbor(x, length, reach, before, dilation, causal))
        return first * stride, (last + reach - dilation) * stride + (stride - 1)

    return ready(axis_mask, key_range=key_range if outer else None)


def _first_neighbor(x: Tensor, length: int, reach: int, before: int, dilation: int, causal: bool) -> Tensor:
    """First coordinate of the window of coordinate `x`."""
    start = x - before
    if dilation == 1:
        return start.clamp(min=0) if causal else start.clamp(0, length - reach)
    if not causal:
        start = start.minimum((x - length) % dilation + (length - reach))
    return start.maximum(x % dilation)
