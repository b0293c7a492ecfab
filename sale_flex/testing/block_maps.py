# SPDX-License-Identifier: BSD-3-Clause
"""Block maps, which are easy to reason about, and BlockMasks, which are what flex_attention takes; both ways.

A block map is a bool tensor ``[B, H, nq, nk]``: which blocks of the attention map are computed.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from sale_flex.mods import MaskMod
from sale_flex.reference import KeepMap


class BlockMap(NamedTuple):
    """The blocks that a BlockMask lists."""

    partial: Tensor
    """bool ``[B, H, nq, nk]``: blocks in which flex_attention asks the mask_mod."""
    full: Tensor
    """bool ``[B, H, nq, nk]``: blocks in which it does not."""

    @property
    def kept(self) -> Tensor:
        """bool ``[B, H, nq, nk]``: blocks that are computed."""
        return self.partial | self.full


def decode_list(num: Tensor, indices: Tensor, blocks: int) -> Tensor:
    """The set that a count and a list of indices describe.

    Args:
        num: int ``[..., nq]``.
        indices: int ``[..., nq, W]``; entries from `num` on mean nothing.
        blocks: How many key blocks there are, nk.

    Returns:
        bool ``[..., nq, nk]``.

    Raises:
        AssertionError: A count or an index is out of range, or the indices do not ascend strictly.
    """
    width = indices.shape[-1]
    assert bool(((num >= 0) & (num <= width)).all()), f"a count is outside [0, {width}]: {num.unique().tolist()}"
    used = torch.arange(width, device=num.device) < num[..., None]
    # One column more takes what is not used.
    listed = torch.where(used, indices, blocks).long()
    inside = (listed >= 0) & (listed < blocks)
    assert bool((inside | ~used).all()), f"an index is outside [0, {blocks})"
    ascending = (listed[..., 1:] > listed[..., :-1]) | ~used[..., 1:]
    assert bool(ascending.all()), "indices do not ascend strictly"
    flags = torch.zeros(*num.shape, blocks + 1, dtype=torch.bool, device=num.device)
    return flags.scatter_(-1, listed, True)[..., :blocks]


def block_map(block_mask: BlockMask) -> BlockMap:
    """The blocks of a BlockMask, with its lists checked.

    Raises:
        AssertionError: As `decode_list`, or a block is both partial and full.
    """
    q_len, kv_len = block_mask.seq_lengths
    block_q, block_k = block_mask.BLOCK_SIZE
    rows, blocks = -(-q_len // block_q), -(-kv_len // block_k)
    partial = decode_list(block_mask.kv_num_blocks, block_mask.kv_indices, blocks)
    full = torch.zeros_like(partial)
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        full = decode_list(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, blocks)
    assert partial.shape[2] == rows, f"{partial.shape[2]} rows of blocks for {q_len} queries"
    assert not bool((partial & full).any()), "a block is both partial and full"
    return BlockMap(partial, full)


def to_block_mask(
    kept: Tensor,
    mask_mod: MaskMod,
    block_size: tuple[int, int],
    q_len: int,
    kv_len: int,
    full: Tensor | None = None,
) -> BlockMask:
    """A BlockMask that computes the blocks of a map.

    Args:
        kept: bool ``[B, H, nq, nk]``.
        mask_mod: Which elements of a kept block are visible. The BlockMask's own mask_mod also looks the block up, so
            that flex_attention gives the same answer compiled and not.
        block_size: (query rows, keys) of a block.
        q_len: Query rows.
        kv_len: Keys.
        full: bool, broadcastable to `kept`: blocks that, if kept, need no mask_mod; by default none.
    """
    block_q, block_k = block_size
    full = kept & (torch.zeros_like(kept) if full is None else full)

    def kept_and_visible(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kept[b, h, q_idx // block_q, kv_idx // block_k] & mask_mod(b, h, q_idx, kv_idx)

    return BlockMask.from_kv_blocks(
        *_encode(kept & ~full),
        *_encode(full),
        BLOCK_SIZE=block_size,
        mask_mod=kept_and_visible,
        seq_lengths=(q_len, kv_len),
        compute_q_blocks=False,
    )


def _encode(flags: Tensor) -> tuple[Tensor, Tensor]:
    """Count and ascending indices of the set flags; a stable sort puts them first."""
    order = flags.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return flags.sum(-1, dtype=torch.int32), order.to(torch.int32)


def expand_blocks(blocks: Tensor, block_size: tuple[int, int], q_len: int, kv_len: int) -> Tensor:
    """A map of blocks as a mask of elements: ``[..., nq, nk]`` to ``[..., Sq, Skv]``."""
    rows = blocks.repeat_interleave(block_size[0], -2)[..., :q_len, :]
    return rows.repeat_interleave(block_size[1], -1)[..., :kv_len]


def any_in_block(elements: Tensor, block_size: tuple[int, int]) -> Tensor:
    """Blocks with a set element: bool ``[..., Sq, Skv]`` to ``[..., nq, nk]``."""
    block_q, block_k = block_size
    padding = (0, -elements.shape[-1] % block_k, 0, -elements.shape[-2] % block_q)
    padded = torch.nn.functional.pad(elements, padding)
    return padded.unflatten(-1, (-1, block_k)).unflatten(-3, (-1, block_q)).any(-1).any(-2)


def assert_same_blocks(kept: Tensor, expected: KeepMap, within: float = 1e-5) -> int:
    """Assert that a block map is the reference's, but for blocks on the very threshold.

    Args:
        kept: bool ``[B, Hq, nq, nk]``.
        expected: What `sale_flex.reference.keep_map` decided.
        within: How far, in nats, a block may be from what it must reach, by its margin, for it to differ. The default
            suits the relative rule and moderate logits; `mass_error_bound` is the mass rule's.

    Returns:
        How many blocks differ.

    Raises:
        AssertionError: A block differs that is further away.
    """
    differs = kept != expected.kept
    far = differs & ~(expected.margin.abs() <= within)
    assert not bool(far.any()), (
        f"{int(far.sum())} of {far.numel()} blocks differ, for instance (batch, head, row, column) "
        f"{far.nonzero()[0].tolist()}, which is {float(expected.margin[far][0]):+.3g} from the threshold"
    )
    return int(differs.sum())
