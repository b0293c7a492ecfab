# SPDX-License-Identifier: BSD-3-Clause
"""What kernels are told beside tensors, as a few tuples: the contract that ops, kernels and the torch path share."""

from typing import Annotated, Any, NamedTuple

from torch import Tensor

Length = Annotated[int, "symbolic"]
"""A number that differs from call to call: torch.compile may leave it open."""

ModLike = Annotated[Any, "mod"]
"""A mod. An op takes the key of its program and the tensors that it captures, a kernel the jit function and what that
reads, the torch path a callable; the last two None for no mod."""


class Grid(NamedTuple):
    """Lengths in tokens and block sizes of one attention map."""

    q_len: Length
    kv_len: Length
    block_q: int
    block_k: int

    @property
    def query_blocks(self) -> int:
        """Blocks of query rows, the last one ragged."""
        return (self.q_len + self.block_q - 1) // self.block_q

    @property
    def key_blocks(self) -> int:
        """Blocks of keys, the last one ragged."""
        return (self.kv_len + self.block_k - 1) // self.block_k

    @property
    def words(self) -> int:
        """32-bit words that hold one bit per key block."""
        return (self.key_blocks + 31) // 32


class Near(NamedTuple):
    """Which visible blocks are kept whatever a rule says, and are no candidates of its."""

    sink_tokens: int
    """Those with one of so many keys from a row's first on."""
    local_tokens: int
    """Those with one of so many keys up to a row's position (without causality also from there on)."""
    min_length: Length
    """All that a row sees whose last key is fewer than this many behind its first one."""


class MaskSpec(NamedTuple):
    """Who sees whom, apart from lengths."""

    bounds: Tensor
    """int32 ``[B, 3]`` = (q_offset, start, end): where row 0 stands, first valid key, one past the last."""
    causal: bool
    """Whether a row sees no key behind its own position."""
    mask: ModLike
    """The mask_mod."""
    listed: Tensor | None
    """int32 ``[1 | B, 1 | Hq, nq', ceil(nk' / 32)]``: bits of the blocks of the user's block mask."""
    listed_q: int
    """Query rows of such a block."""
    listed_k: int
    """Keys of such a block."""


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
    """What a `MaskSpec` makes of the blocks. Without one, attention is causal, and candidates are a span of blocks."""

    visibility: BlockVisibility
    candidates: CandidateBlocks


class KeyMoments(NamedTuple):
    """Codes of sub-blocks of keys, by their mean and variance; of single keys, without variances."""

    mean_codes: Tensor
    """int8 ``[B, Hkv, N, D]``, N sub-blocks, filled up to whole tiles; of single keys, rotated."""
    mean_scale: Tensor
    """float32 ``[B, Hkv, N / subs]``: a scale per key block."""
    var_codes: Tensor
    """int8 ``[B, Hkv, N, D]``; N = 0 for single keys."""
    var_scale: Tensor
    """float32 ``[B, Hkv, N / subs]``."""
    nonfinite: Tensor
    """int32 ``[B, Hkv, ceil(nk / 32)]``: bits of key blocks that are not finite. They are always hit."""


class MassOptions(NamedTuple):
    """How the mass rule estimates."""

    sub_block: int
    """Keys that are estimated together; 1: every key by itself."""
    pool: int
    """Query rows that one scored row stands for."""
    sample: bool
    """Whether it is the last of them, alone, instead of their mean."""
    bits: int
    """Width of the codes, 4 or 8."""
