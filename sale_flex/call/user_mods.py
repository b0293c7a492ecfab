# SPDX-License-Identifier: BSD-3-Clause
"""What a user says about who sees whom and with which score: FlexAttention's mods, and a block mask of their own."""

from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, noop_mask

from sale_flex import ops
from sale_flex.blocks.mask_spec import Mod
from sale_flex.config import SaleConfig
from sale_flex.kernels.arguments import MaskSpec
from sale_flex.mods import MaskMod, ScoreMod
from sale_flex.mods.compiler import conjunction, describe, facts, require_supported
from sale_flex.mods.placed import placed_in_call

ESTIMATE_MODS = ("apply", "ignore")


class UserMods(NamedTuple):
    """A call's mods as they were given."""

    score_mod: ScoreMod | None = None
    mask_mod: MaskMod | None = None
    block_mask: BlockMask | None = None
    is_causal: bool = True
    estimate: str = "apply"
    """Whether the estimate sees the mods: ``"apply"`` or ``"ignore"``."""

    @property
    def plain(self) -> bool:
        """Whether this is causal attention and nothing else; then there is nothing to check either."""
        nothing = self.score_mod is None and self.mask_mod is None and self.block_mask is None
        return nothing and self.is_causal is True and self.estimate in ESTIMATE_MODS

    def placed(self, q_offset: Tensor) -> "UserMods":
        """With the ready mods that follow the call at its positions, int32 ``[B]``. A block mask is of the call."""
        score_mod, mask_mod = self.score_mod, self.mask_mod
        if score_mod is not None:
            score_mod = placed_in_call(score_mod, q_offset)
        if mask_mod is not None:
            mask_mod = placed_in_call(mask_mod, q_offset)
        return self._replace(score_mod=score_mod, mask_mod=mask_mod)

    @property
    def masks(self) -> list[MaskMod]:
        """The mask_mods that hide something, the user's own and the block mask's."""
        given = [] if self.mask_mod is None else [self.mask_mod]
        own = None if self.block_mask is None else self.block_mask.mask_mod
        return given if own is None or own is noop_mask else [*given, own]


class MaskedBy(NamedTuple):
    """The mods as the estimate sees them."""

    spec: MaskSpec
    heads: int
    """Hs: 1 if all heads see the same, else Hq."""
    range: Mod
    """Of the mask_mod's ``key_range``."""
    score: Mod
    needs_scan: bool
    """Whether the score_mod changes from key to key, so that a sub-block's middle key can not stand for the others."""
    ignored_mask: bool
    """Whether a mask_mod is left out: then no block is known to be full."""


def check_mods(query: Tensor, key: Tensor, mods: UserMods, config: SaleConfig) -> None:
    """Raise TypeError or ValueError for the first mod that breaks its rule."""
    for name, mod in (("score_mod", mods.score_mod), ("mask_mod", mods.mask_mod)):
        if mod is not None and not callable(mod):
            raise TypeError(f"{name} must be a callable as flex_attention takes it, or None, got {type(mod).__name__}.")
    if not isinstance(mods.is_causal, bool):
        raise TypeError(f"is_causal must be True or False, got {mods.is_causal!r}.")
    if mods.estimate not in ESTIMATE_MODS:
        raise ValueError(f"estimate_mods must be one of {ESTIMATE_MODS}, got {mods.estimate!r}.")
    if mods.block_mask is not None:
        _check_block_mask(query, key, mods.block_mask)
        _check_block_sizes((mods.block_mask.BLOCK_SIZE[0], mods.block_mask.BLOCK_SIZE[1]), config.block_size)


def _check_block_mask(query: Tensor, key: Tensor, block_mask: BlockMask) -> None:
    if not isinstance(block_mask, BlockMask):
        raise TypeError(
            "block_mask must be a torch.nn.attention.flex_attention.BlockMask, or None, got "
            f"{type(block_mask).__name__}."
        )
    lengths = tuple(block_mask.seq_lengths)
    if lengths != (query.shape[2], key.shape[2]):
        raise ValueError(
            f"block_mask must have the lengths of query and key, ({query.shape[2]}, {key.shape[2]}), got {lengths}; "
            "make it for this call."
        )
    batch, heads = block_mask.kv_num_blocks.shape[:2]
    if batch not in (1, query.shape[0]) or heads not in (1, query.shape[1]):
        raise ValueError(
            f"block_mask must have 1 or {query.shape[0]} batch rows and 1 or {query.shape[1]} heads, as the query, got "
            f"{batch} and {heads}."
        )
    if block_mask.kv_num_blocks.device != query.device:
        raise ValueError(
            f"block_mask must be on the query's device {query.device}, got {block_mask.kv_num_blocks.device}; move it "
            "with block_mask.to()."
        )


def _check_block_sizes(theirs: tuple[int, int], ours: tuple[int, int]) -> None:
    if any(x < y for x, y in zip(theirs, ours)) and any(size & (size - 1) for size in theirs):
        raise ValueError(
            f"block_mask must have blocks of powers of two where they are smaller than config.block_size {ours}, got "
            f"{theirs}."
        )
    for name, x, y in zip(("query rows", "keys"), theirs, ours):
        if x % y and y % x:
            raise ValueError(
                f"block_mask must have blocks of a multiple or a divisor of config.block_size {ours}, got {theirs}: "
                f"{x} {name} beside {y}; make one of them fit the other."
            )


def read_mods(mods: UserMods, query: Tensor, key: Tensor, bounds: Tensor, use: str = "") -> MaskedBy:
    """The mods as the estimate sees them.

    Args:
        mods: As given.
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``.
        bounds: int32 ``[B, 3]``.
        use: What they are followed for besides the estimate, for the error.

    Raises:
        NotImplementedError: A mod has an operation that the estimate can not follow.
    """
    ignore = mods.estimate == "ignore"
    masks = [] if ignore else mods.masks
    described = [_described(mask, "mask", "mask_mod", query, use) for mask in masks]
    mask = described[0] if described else Mod()
    for other in described[1:]:
        mask = Mod(conjunction(mask.key, other.key), [*mask.tensors, *other.tensors])
    key_range = Mod()
    if mods.mask_mod is not None and not ignore and hasattr(mods.mask_mod, "key_range"):
        key_range = _described(mods.mask_mod.key_range, "range", "mask_mod.key_range", query, use)
    score = Mod()
    if mods.score_mod is not None and not ignore:
        score = _described(mods.score_mod, "score", "score_mod", query, use)
    listed, listed_q, listed_k = None, 1, 1
    if mods.block_mask is not None:
        listed_q, listed_k = mods.block_mask.BLOCK_SIZE
        listed = ops.block_mask_bits(
            mods.block_mask.kv_num_blocks,
            mods.block_mask.kv_indices,
            mods.block_mask.full_kv_num_blocks,
            mods.block_mask.full_kv_indices,
            -(-key.shape[2] // listed_k),
        )
    by_head = (bool(mask.key) and facts(mask.key).uses_head) or (listed is not None and listed.shape[1] > 1)
    return MaskedBy(
        spec=MaskSpec(bounds, mods.is_causal, mask, listed, listed_q, listed_k),
        heads=query.shape[1] if by_head else 1,
        range=key_range,
        score=score,
        needs_scan=bool(score.key) and facts(score.key).rough,
        ignored_mask=ignore and bool(mods.masks),
    )


def _described(mod: Any, kind: Any, argument: str, query: Tensor, use: str) -> Mod:
    described = describe(mod, kind)
    require_supported(described.key, argument + use)
    for tensor in described.tensors:
        if tensor.device != query.device:
            raise ValueError(
                f"{argument} must capture tensors on the query's device {query.device}, got one of shape "
                f"{list(tensor.shape)} on {tensor.device}; move it before the mod is made."
            )
    return Mod(described.key, described.tensors)
