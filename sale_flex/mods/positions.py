# SPDX-License-Identifier: BSD-3-Clause
"""Masks of positions alone: causal, sliding window, prefix LM."""

from torch import Tensor

from sale_flex.mods.arguments import checked_count, checked_indices
from sale_flex.mods.placed import placed_mask
from sale_flex.mods.ready import MaskMod, ready


def causal(q_offset: int | Tensor | None = None) -> MaskMod:
    """A row sees the keys up to its own position: ``kv <= p``.

    Args:
        q_offset: Key position of query row 0; None: that of the call (`sale_flex.mods`, "Positions").

    Example:
        ``mask_mod=causal(q_offset=key.shape[2] - query.shape[2])``
    """

    def causal_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx <= q_idx

    def key_range(b: Tensor, h: Tensor, first_q: Tensor, last_q: Tensor) -> tuple[Tensor, Tensor]:
        return first_q * 0, last_q

    return placed_mask(ready(causal_mask, key_range=key_range), q_offset)


def sliding_window(window: int, q_offset: int | Tensor | None = None, *, causal: bool = True) -> MaskMod:
    """A row sees the keys near its position: the last `window` ones, its own among them (Beltagy et al. 2020, 3.1).

    Args:
        window: Keys a row sees where there are as many, at least 1: ``p - window + 1 <= kv <= p``. Without `causal` it
            is that many on both sides, ``abs(kv - p) < window``, which makes ``2 * window - 1``.
        q_offset: Key position of query row 0; None: that of the call (`sale_flex.mods`, "Positions").
        causal: Whether keys after the row's position are hidden.

    Example:
        ``mask_mod=sliding_window(4096)``
    """
    window = checked_count("window", window)

    if causal:

        def window_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return (kv_idx <= q_idx) & (kv_idx > q_idx - window)

        def key_range(b: Tensor, h: Tensor, first_q: Tensor, last_q: Tensor) -> tuple[Tensor, Tensor]:
            return first_q - window + 1, last_q

        return placed_mask(ready(window_mask, key_range=key_range), q_offset)

    def two_sided_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx < q_idx + window) & (kv_idx > q_idx - window)

    def two_sided_range(b: Tensor, h: Tensor, first_q: Tensor, last_q: Tensor) -> tuple[Tensor, Tensor]:
        return first_q - window + 1, last_q + window - 1

    return placed_mask(ready(two_sided_mask, key_range=two_sided_range), q_offset)


def prefix_lm(prefix_length: int | Tensor, q_offset: int | Tensor | None = None) -> MaskMod:
    """Rows see the whole prefix and, after it, the keys up to their position (Raffel et al. 2020, 3.2.1).

    ``kv <= p or kv < prefix_length[b]``

    Args:
        prefix_length: Keys in the prefix: an int, or an integer tensor ``[]`` or ``[B]``.
        q_offset: Key position of query row 0; None: that of the call (`sale_flex.mods`, "Positions").

    Example:
        ``mask_mod=prefix_lm(torch.tensor([812, 40], device="cuda"))``
    """
    if isinstance(prefix_length, Tensor):
        if prefix_length.dim() > 1:
            raise ValueError(
                "prefix_length must be an int or an integer tensor [] or [batch], "
                f"got shape {list(prefix_length.shape)}; drop dimensions with squeeze()."
            )
        prefix_length = checked_indices("prefix_length", prefix_length)
        if prefix_length.dim() == 1:
            return placed_mask(_prefix_per_row(prefix_length), q_offset)
    elif isinstance(prefix_length, bool) or not isinstance(prefix_length, int):
        raise TypeError(f"prefix_length must be an int or an integer tensor, got {type(prefix_length).__name__}.")
    elif prefix_length < 0:
        raise ValueError(f"prefix_length must be at least 0, got {prefix_length}; 0 is a causal mask.")

    def prefix_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx <= q_idx) | (kv_idx < prefix_length)

    def key_range(b: Tensor, h: Tensor, first_q: Tensor, last_q: Tensor) -> tuple[Tensor, Tensor]:
        # The sum makes a tensor of an int prefix: torch.maximum takes no ints.
        return first_q * 0, last_q.maximum(first_q * 0 + prefix_length - 1)

    return placed_mask(ready(prefix_mask, key_range=key_range), q_offset)


def _prefix_per_row(prefix_length: Tensor) -> MaskMod:
    """`prefix_lm` for int32 ``[B]``."""

    def prefix_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx <= q_idx) | (kv_idx < prefix_length[b])

    def key_range(b: Tensor, h: Tensor, first_q: Tensor, last_q: Tensor) -> tuple[Tensor, Tensor]:
        return first_q * 0, last_q.maximum(prefix_length[b] - 1)

    return ready(prefix_mask, key_range=key_range)
