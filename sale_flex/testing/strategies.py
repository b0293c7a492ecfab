# SPDX-License-Identifier: BSD-3-Clause
"""Hypothesis strategies for attention: shapes, positions, paddings, block maps, mods, and SALE's options.

They draw descriptions, not tensors: a failing example prints as ``Shape(q_len=65, ...)`` and a seed, and shrinks to the
smallest shape that fails. The factories of `sale_flex.testing.inputs` make tensors of them.

Needs Hypothesis (``pip install 'sale-flex[test]'``), which nothing else in `sale_flex.testing` does.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from sale_flex.config import BLOCK_SIZES, SaleConfig
from sale_flex.mods import MaskMod, ScoreMod
from sale_flex.selection.rules import Mass, Relative, Rule
from sale_flex.selection.rules.mass import POOL_MODES, POOLS, SUB_BLOCKS
from sale_flex.testing.inputs import Shape

GROUPS = (1, 2, 3, 4, 5, 7, 8)
"""Query heads that share a KV head: powers of two, and those of models that are none."""

HEAD_DIMS = (32, 64, 80, 96, 128, 192, 256)
"""Every head_dim that sale_flex takes; 80, 96 and 192 are not powers of two."""


def seeds() -> st.SearchStrategy[int]:
    """Seeds for the input factories."""
    return st.integers(0, 2**31 - 1)


def lengths(most: int, block: int = 64, least: int = 1) -> st.SearchStrategy[int]:
    """Lengths in tokens, more often than chance on the edges of blocks and beside them."""
    blocks = max(1, most // block)
    edges = st.builds(lambda n, d: min(max(n * block + d, least), most), st.integers(1, blocks), st.integers(-1, 1))
    return st.integers(least, most) | edges


@st.composite
def shapes(
    draw: st.DrawFn,
    *,
    max_tokens: int = 256,
    min_tokens: int = 1,
    batch: int | None = None,
    kv_heads: Sequence[int] = (1, 2),
    groups: Sequence[int] = GROUPS,
    head_dims: Sequence[int] = (32, 64),
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    chunked: bool = True,
    padded: bool = True,
) -> Shape:
    """Attention calls of every form.

    Args:
        draw: Supplied by Hypothesis.
        max_tokens: Most keys.
        min_tokens: Fewest keys, and fewest queries if not `chunked`.
        batch: Batch rows; None for 1 to 3.
        kv_heads: Choices of KV heads.
        groups: Choices of query heads per KV head.
        head_dims: Choices of channels.
        dtypes: Choices of dtype.
        chunked: Also fewer queries than keys, anywhere among them.
        padded: Also left and right padding, different in every batch row and up to all of it.
    """
    kv_len = draw(lengths(max_tokens, least=min_tokens))
    shared = draw(st.sampled_from(kv_heads))
    shape = Shape(
        q_len=kv_len,
        kv_len=kv_len,
        batch=draw(st.integers(1, 3)) if batch is None else batch,
        heads=shared * draw(st.sampled_from(groups)),
        kv_heads=shared,
        head_dim=draw(st.sampled_from(head_dims)),
        dtype=draw(st.sampled_from(dtypes)),
    )
    if chunked and draw(st.booleans()):
        q_len = draw(lengths(kv_len))
        shape = replace(shape, q_len=q_len, q_offset=draw(st.none() | st.integers(0, kv_len - q_len)))
    if padded and draw(st.booleans()):
        shape = replace(shape, kv_range=tuple(draw(paddings(kv_len)) for _ in range(shape.batch)))
    return shape


@st.composite
def paddings(draw: st.DrawFn, kv_len: int) -> tuple[int, int]:
    """First and one-past-last valid key of one batch row: padding on the left, the right, both or neither."""
    start = draw(st.just(0) | st.integers(0, kv_len))
    return start, draw(st.just(kv_len) | st.integers(start, kv_len))


def thresholds(least: float = 1e-4, most: float = 10.0) -> st.SearchStrategy[float]:
    """Relative attention scores, or shares: 0 (dense), and positive ones evenly on a logarithmic scale."""
    low, high = torch.tensor([least, most]).log2().tolist()
    return st.just(0.0) | st.floats(low, high).map(lambda power: round(2.0**power, 6))


@st.composite
def rules(
    draw: st.DrawFn,
    *,
    heads: int | None = None,
    kinds: Sequence[type[Rule]] = (Mass, Relative),
    bits: Sequence[int] = (4, 8),
    block_k: int = 64,
) -> Rule:
    """The options of `Mass` and `Relative`, and no `max_blocks`.

    Args:
        draw: Supplied by Hypothesis.
        heads: If given, a threshold may also be a tensor of this many.
        kinds: Choices of rule.
        bits: Choices of code width.
        block_k: Keys a block: the largest sub-block.
    """
    kind = draw(st.sampled_from(kinds))
    levels = thresholds() if kind is Relative else thresholds(most=1.5)
    threshold: float | Tensor = draw(levels)
    if heads is not None and draw(st.booleans()):
        threshold = torch.tensor([draw(levels) for _ in range(heads)])
    width = draw(st.sampled_from(bits))
    if kind is Relative:
        return Relative(threshold, bits=width)
    return Mass(
        threshold,
        pool=draw(st.sampled_from(POOLS)),
        pool_mode=draw(st.sampled_from(POOL_MODES)),
        # A scan as often as moments of any size.
        sub_block=draw(st.just(1) | st.sampled_from([size for size in SUB_BLOCKS if 1 < size <= block_k])),
        bits=width,
    )


@st.composite
def configs(
    draw: st.DrawFn,
    *,
    heads: int | None = None,
    kinds: Sequence[type[Rule]] = (Mass, Relative),
    block_sizes: Sequence[tuple[int, int]] = BLOCK_SIZES,
    bits: Sequence[int] = (4, 8),
    max_min_length: int = 128,
    max_window: int = 150,
) -> SaleConfig:
    """The options of `SaleConfig`, with lengths that suit prompts of some hundred tokens.

    Args:
        draw: Supplied by Hypothesis.
        heads: If given, a threshold may also be a tensor of this many.
        kinds: Choices of rule; see `rules`.
        block_sizes: Choices of block size.
        bits: Choices of code width.
        max_min_length: Largest ``min_length``, in tokens; 0 leaves all but the windows to the rule.
        max_window: Largest ``sink_tokens`` and ``local_tokens``; small ones leave more blocks to the rule.
    """
    block_size = draw(st.sampled_from(block_sizes))
    return SaleConfig(
        rule=draw(rules(heads=heads, kinds=kinds, bits=bits, block_k=block_size[1])),
        block_size=block_size,
        sink_tokens=draw(st.integers(0, max_window)),
        local_tokens=draw(st.integers(1, max_window)),
        min_length=draw(st.integers(0, max_min_length)),
        smooth_tokens=draw(st.just(0) | st.integers(1, 300)),
    )


@st.composite
def calls(
    draw: st.DrawFn,
    /,
    *,
    kinds: Sequence[type[Rule]] = (Mass, Relative),
    block_sizes: Sequence[tuple[int, int]] = BLOCK_SIZES,
    bits: Sequence[int] = (4, 8),
    max_min_length: int = 128,
    max_window: int = 150,
    **options: Any,
) -> tuple[Shape, SaleConfig]:
    """A shape, with the options of `shapes`, and a config that suits it, at times with a threshold per head."""
    shape = draw(shapes(**options))
    config = configs(
        heads=shape.heads,
        kinds=kinds,
        block_sizes=block_sizes,
        bits=bits,
        max_min_length=max_min_length,
        max_window=max_window,
    )
    return shape, draw(config)


@st.composite
def block_maps(draw: st.DrawFn, batch: int, heads: int, query_blocks: int, key_blocks: int) -> Tensor:
    """Any sets of blocks, bool ``[B, H, nq, nk]``; empty rows and full rows are among them."""
    rows = batch * heads * query_blocks
    words = draw(st.lists(st.integers(0, 2**key_blocks - 1), min_size=rows, max_size=rows))
    bits = [[word >> block & 1 for block in range(key_blocks)] for word in words]
    return torch.tensor(bits, dtype=torch.bool).view(batch, heads, query_blocks, key_blocks)


def mask_mods(max_tokens: int = 256) -> st.SearchStrategy[MaskMod]:
    """Masks that models use: causal, sliding window, a bidirectional prefix, packed documents.

    Each is a function of ``(b, h, q_idx, kv_idx)`` whose name says its parameters. Every query sees itself.
    """
    return (
        st.just(causal)
        | st.integers(1, max_tokens).map(sliding_window)
        | st.integers(1, max_tokens).map(prefix_lm)
        | st.lists(st.integers(1, max_tokens - 1), max_size=3).map(documents)
    )


def score_mods() -> st.SearchStrategy[ScoreMod]:
    """Changes of the logits that models use: none, a slope per head (ALiBi), a soft cap, a relative bias."""
    return st.sampled_from([unchanged, alibi, soft_cap, relative_bias])


def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Keys up to the query."""
    return kv_idx <= q_idx


def sliding_window(width: int) -> MaskMod:
    """The last `width` keys up to the query."""

    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx <= q_idx) & (kv_idx > q_idx - width)

    return _named(mask, f"sliding_window({width})")


def prefix_lm(length: int) -> MaskMod:
    """Causal, and everyone sees the first `length` keys."""

    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx <= q_idx) | (kv_idx < length)

    return _named(mask, f"prefix_lm({length})")


def documents(starts: Sequence[int]) -> MaskMod:
    """Causal within documents that are packed one after the other; `starts` are the first tokens of later ones."""

    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        same = kv_idx <= q_idx
        for start in starts:
            same = same & ((q_idx >= start) == (kv_idx >= start))
        return same

    return _named(mask, f"documents({list(starts)})")


def unchanged(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """The logit as it is."""
    return score


def alibi(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """A penalty that grows with the distance, by head."""
    return score - (q_idx - kv_idx).abs() * 2.0 ** -(h + 1.0)


def soft_cap(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Logits squeezed into (-20, 20)."""
    return 20.0 * (score / 20.0).tanh()


def relative_bias(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """A bonus for the key at the query's own position."""
    return score + (q_idx == kv_idx)


def _named(mask: MaskMod, name: str) -> MaskMod:
    mask.__name__ = mask.__qualname__ = name
    return mask
