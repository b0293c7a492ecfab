# SPDX-License-Identifier: BSD-3-Clause
"""Who sees whom in a call under mods, and what that makes of the grid of blocks (docs/semantics.md)."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Mod(NamedTuple):
    """A mod as ops take it."""

    key: str = ""
    """Of its program; empty for no mod."""
    tensors: Sequence[Tensor] = ()
    """What it captures."""


class MaskSpec(NamedTuple):
    """Who sees whom, apart from lengths."""

    bounds: Tensor
    """int32 ``[B, 3]`` = (q_offset, start, end)."""
    causal: bool
    """Whether a row sees no key behind its own position."""
    mask_key: str
    """Key of the mask_mod's program."""
    mask_tensors: Sequence[Tensor]
    """What the mask_mod captures."""
    listed: Tensor | None
    """int32 ``[1 | B, 1 | Hq, nq', ceil(nk' / 32)]``: bits of the blocks of the user's block mask."""
    listed_q: int
    """Query rows of such a block."""
    listed_k: int
    """Keys of such a block."""


def causal_spec(bounds: Tensor) -> MaskSpec:
    """Plain causal attention as a mask."""
    return MaskSpec(bounds, True, "", (), None, 1, 1)


class BlockVisibility(NamedTuple):
    """What a `MaskSpec` makes of the grid of blocks, for each of Hs heads: 1, or Hq if heads differ."""

    visible: Tensor
    """int32 ``[B, Hs, nq, ceil(nk / 32)]``: bits of the blocks in which some row sees some key."""
    full: Tensor
    """Likewise: blocks in which every row sees every key inside the tensors."""
    row_kv_bounds: Tensor
    """int32 ``[B, Hs, 2, nq * BQ]``: first and last key that each row sees, 2**30 and -1 if there is none."""


class CandidateBlocks(NamedTuple):
    """The visible blocks of every query block in three ascending runs: always kept, partial candidates, whole ones."""

    always: Tensor
    """int32 ``[B, Hs, nq, ceil(nk / 32)]``: bits of the first run."""
    counts: Tensor
    """int32 ``[B, Hs, nq, 3]``: lengths of the runs."""
    blocks: Tensor
    """int32 ``[B, Hs, nq, nk]``: key blocks; what follows the runs means nothing."""


class Structure(NamedTuple):
    """What the mods of a call make of the grid of blocks."""

    visibility: BlockVisibility
    candidates: CandidateBlocks | None
    """None where nothing is estimated, because all that is visible is kept."""
