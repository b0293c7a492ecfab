# SPDX-License-Identifier: BSD-3-Clause
"""Scores: linear, capped, and biased by a table of distances."""

import math

import torch
from torch import Tensor

from sale_flex.mods.arguments import checked_count, checked_table
from sale_flex.mods.held import held
from sale_flex.mods.placed import placed_score
from sale_flex.mods.ready import ScoreMod, ready


def alibi(
    slopes: int | Tensor, q_offset: int | Tensor | None = None, *, device: torch.device | str | None = None
) -> ScoreMod:
    """Linear biases, ``score + slopes[h] * (kv - p)``: the farther back a key, the lower (ALiBi, Press et al. 2022, 3).

    Args:
        slopes: One per query head: a floating-point tensor ``[H]``, positive. Or the number of heads, which gives the
            paper's: ``2 ** (-8 * (h + 1) / H)``; for an `H` between two powers of two those of the lower power, then
            every other one of the higher power.
        q_offset: Key position of query row 0; None: that of the call (`sale_flex.mods`, "Positions").
        device: Where to put slopes made from a number of heads (None: torch's default device).

    Example:
        ``score_mod=alibi(32, device="cuda")``
    """
    if isinstance(slopes, Tensor):
        if device is not None:
            raise ValueError(f"device must be None where slopes is a tensor, got {device}; move it with slopes.to().")
        slopes = checked_table("slopes", slopes, "heads")
    else:
        slopes = _standard_slopes(checked_count("slopes (a number of heads, or a tensor)", slopes), device)

    def alibi_score(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + slopes[h] * (kv_idx - q_idx)

    return placed_score(ready(alibi_score), q_offset)


def _standard_slopes(heads: int, device: torch.device | str | None) -> Tensor:
    """The slopes of the paper, float32 ``[heads]``, and of its authors' code where `heads` is no power of two."""
    head = torch.arange(heads, device=device)
    lower = 1 << (heads.bit_length() - 1)
    exponent = torch.where(head < lower, (head + 1) * (-8 / lower), (2 * (head - lower) + 1) * (-4 / lower))
    return held(torch.exp2(exponent.float()))


def softcap(cap: float) -> ScoreMod:
    """Scores between ``-cap`` and ``cap``: ``cap * tanh(score / cap)`` (Gemma 2, 2024, section 2).

    Args:
        cap: A finite number above 0, in the unit of scores (after scaling).

    Example:
        ``score_mod=softcap(50.0)``
    """
    if isinstance(cap, bool) or not isinstance(cap, (int, float)):
        raise TypeError(f"cap must be a float above 0, got {type(cap).__name__}.")
    if not (math.isfinite(cap) and cap > 0):
        raise ValueError(f"cap must be finite and above 0, got {cap!r}; pass no score_mod for scores without a cap.")
    # As a string, which torch.compile takes for the constant it is. Of a captured float it makes a symbol once it
    # changes, at once if compiled with dynamic=True, and flex_attention cannot be lowered with one (torch 2.13).
    digits = float(cap).hex()

    def capped_score(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        bound = float.fromhex(digits)
        return bound * torch.tanh(score * (1 / bound))

    return ready(capped_score)


def relative_bias(
    table: Tensor, q_offset: int | Tensor | None = None, *, center: int = 0, rough: bool = False
) -> ScoreMod:
    """A learned bias per head and distance, ``score + table[h, clamp(p - kv + center, 0, n - 1)]``.

    With `center` 0 entry `i` is the bias of the key `i` positions back, and keys that lie after the row share entry 0.
    With ``center=n // 2`` for an odd `n` the table serves both sides, as clipped distances do (Shaw et al. 2018, 3.2).

    Args:
        table: Floating-point ``[H, n]``, used in float32.
        q_offset: Key position of query row 0; None: that of the call (`sale_flex.mods`, "Positions").
        center: Column of distance 0, from 0 to ``n - 1``.
        rough: Whether neighbouring entries differ by several nats, so that one cannot stand for the next. False lets
            sale_attention estimate a few keys at a time by the middle one's bias, which loses nothing for entries that
            differ by one (docs/masks.md); True makes it look at every key, for ten times the time.

    Example:
        ``score_mod=relative_bias(self.bias, center=self.bias.shape[1] // 2)``
    """
    table = checked_table("table", table, "heads, distances")
    last = table.shape[1] - 1
    if isinstance(center, bool) or not isinstance(center, int):
        raise TypeError(f"center must be an int, got {type(center).__name__}.")
    if not 0 <= center <= last:
        raise ValueError(f"center must be a column of the table, from 0 to {last}, got {center}.")

    def biased_score(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        column = (q_idx - kv_idx + center).clamp(0, last)
        return score + table[h, column]

    return placed_score(ready(biased_score, rough=rough), q_offset)


def bucketed_bias(
    table: Tensor,
    q_offset: int | Tensor | None = None,
    *,
    max_distance: int = 128,
    bidirectional: bool = False,
) -> ScoreMod:
    """A learned bias per head and bucket of distances, as in T5 (Raffel et al. 2020, 2.1, and its code).

    The first half of the buckets is a distance each, the second half grows logarithmically up to `max_distance`; all
    farther keys share the last. `bidirectional` gives keys before and after the row half of the buckets each.

    Args:
        table: Floating-point ``[H, buckets]``: the transposed weight of T5's embedding, ``weight.T``. At least 2
            buckets; if `bidirectional`, at least 4 and an even number.
        q_offset: Key position of query row 0; None: that of the call (`sale_flex.mods`, "Positions").
        max_distance: Distance from which on keys share a bucket, above the number of buckets of one distance each.
        bidirectional: True as in T5's encoder, False as in its decoder, where keys after the row share bucket 0.

    Example:
        ``score_mod=bucketed_bias(decoder.relative_attention_bias.weight.T)``
    """
    table = checked_table("table", table, "heads, buckets")
    buckets = table.shape[1]
    sides = 2 if bidirectional else 1
    if buckets % sides or buckets < 2 * sides:
        rule = "an even number of buckets, at least 4, if bidirectional" if bidirectional else "at least 2 buckets"
        raise ValueError(f"table must have {rule}, got shape {list(table.shape)}.")
    half = buckets // sides
    exact = half // 2
    if checked_count("max_distance", max_distance) <= exact:
        raise ValueError(f"max_distance must be above {exact}, a quarter or half of the buckets, got {max_distance}.")

    distance = torch.arange(max_distance + 1, device=table.device)
    # In float32, as T5's own code: which side of a bucket's border a distance falls on is a matter of rounding.
    octaves = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (octaves * (half - exact)).long()).clamp(max=half - 1)
    bucket = torch.where(distance < exact, distance, far)
    if bidirectional:
        # Columns: max_distance keys after the row, the row's own, max_distance before.
        bucket = torch.cat([half + bucket[1:].flip(0), bucket])
    center = max_distance if bidirectional else 0
    return relative_bias(table[:, bucket], q_offset, center=center)
