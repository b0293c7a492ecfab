# SPDX-License-Identifier: BSD-3-Clause
"""What tests of kernels under mods share: mods in both forms, calls, and their structure from the torch path.

Import it behind ``pytest.importorskip("triton")``.
"""

from types import SimpleNamespace

import torch
import triton
import triton.language as tl

from sale_flex import reference
from sale_flex.blocks.bits import pack_bits
from sale_flex.kernels.arguments import Grid, MaskSpec, MassOptions, Near, Structure
from sale_flex.ops.fallback import structure as structure_torch


@triton.jit
def _window(b, h, q, kv, AUX):
    return (kv - q < AUX[0]) & (q - kv < AUX[0])


@triton.jit
def _documents(b, h, q, kv, AUX):
    return tl.load(AUX[0] + q) == tl.load(AUX[0] + kv)


@triton.jit
def _by_head(b, h, q, kv, AUX):
    return q - kv < tl.load(AUX[0] + h)


@triton.jit
def _to_position(b, h, q, kv, AUX):
    return kv <= q + AUX[0]


@triton.jit
def _last(b, h, q, kv, AUX):
    return (kv <= q + AUX[0]) & (kv > q + AUX[0] - AUX[1])


@triton.jit
def window_range(b, h, first, last, AUX):
    return first - AUX[0] + 1, last + AUX[0] - 1


@triton.jit
def _alibi(score, b, h, q, kv, AUX):
    return score + tl.load(AUX[0] + h) * (kv - q).to(tl.float32)


@triton.jit
def _soft_cap(score, b, h, q, kv, AUX):
    return 4.0 * (2.0 * tl.sigmoid(score * 0.5) - 1.0)


@triton.jit
def _bias(score, b, h, q, kv, AUX):
    return score + tl.load(AUX[0] + (q % AUX[1]) * AUX[1] + kv % AUX[1])


@triton.jit
def _steep(score, b, h, q, kv, AUX):
    return score + 3.0 * (q - kv).to(tl.float32)


@triton.jit
def _broken(score, b, h, q, kv, AUX):
    return tl.where(kv % 9 == 4, float("nan"), tl.where(kv % 9 == 0, float("inf"), score))


GENERATOR = torch.Generator().manual_seed(7)
DOCUMENT = (torch.arange(2048) // 260).int()
REACH = torch.tensor([90, 400, 200, 2000, 33, 64, 128, 700], dtype=torch.int32)
SLOPE = -(2.0 ** -torch.arange(3.0, 11.0))
TABLE = torch.randn(16, 16, generator=GENERATOR)

MASKS = {
    "all": (None, None, False),
    "window": ((_window, (200,)), lambda b, h, q, kv: (kv - q < 200) & (q - kv < 200), False),
    "documents": ((_documents, (DOCUMENT,)), lambda b, h, q, kv: DOCUMENT[q] == DOCUMENT[kv], False),
    "by head": ((_by_head, (REACH,)), lambda b, h, q, kv: q - kv < REACH[h], True),
}
"""Name -> kernel's form, torch's form, whether heads differ."""

CAUSAL_MASKS = {
    "causal": (_to_position, lambda q, kv, offset: kv <= q + offset),
    "window": (_last, lambda q, kv, offset, window: (kv <= q + offset) & (kv > q + offset - window)),
}
"""Name -> kernel's form, torch's form without batch row and head but with the numbers that both take."""

SCORES = {
    "none": (None, None),
    "alibi": ((_alibi, (SLOPE,)), lambda s, b, h, q, kv: s + SLOPE[h] * (kv - q)),
    "soft cap": ((_soft_cap, ()), lambda s, b, h, q, kv: 4 * torch.tanh(s / 4)),
    "bias": ((_bias, (TABLE, 16)), lambda s, b, h, q, kv: s + TABLE[q % 16, kv % 16]),
    "steep": ((_steep, ()), lambda s, b, h, q, kv: s + 3.0 * (q - kv)),
    "broken": (
        (_broken, ()),
        lambda s, b, h, q, kv: s.masked_fill(kv % 9 == 4, torch.nan).masked_fill(kv % 9 == 0, torch.inf),
    ),
}


def make(
    *,
    mask: str = "all",
    score: str = "none",
    is_causal: bool = True,
    q_len: int = 330,
    kv_len: int = 330,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int = 1,
    dim: int = 32,
    dtype: torch.dtype = torch.float32,
    kv_range: tuple[tuple[int, int], ...] | None = None,
    block: tuple[int, int] = (64, 64),
    listed: tuple[int, int] | None = None,
    listed_heads: int = 1,
    pool: int = 4,
    sample: bool = False,
    sub_block: int = 8,
    bits: int = 4,
    sink: int = 4,
    local: int = 20,
    min_length: int = 0,
    threshold: float = 0.1,
    budget: int = 10**6,
    seed: int = 0,
) -> SimpleNamespace:
    """A call's tensors and, from the torch path, its structure and lists."""
    generator = torch.Generator().manual_seed(seed)
    query = (4 * torch.randn(batch, heads, q_len, dim, generator=generator)).to(dtype)
    key = torch.randn(batch, kv_heads, kv_len, dim, generator=generator).to(dtype)
    bounds = reference.make_bounds(batch, q_len, kv_len, kv_range=None if kv_range is None else torch.tensor(kv_range))
    listed_bits, (listed_q, listed_k) = None, listed or (1, 1)
    if listed is not None:
        shape = (1, listed_heads, -(-q_len // listed_q), -(-kv_len // listed_k))
        listed_bits = pack_bits(torch.rand(shape, generator=generator) < 0.7)
    kernel_mask, torch_mask, differs = MASKS[mask]
    kernel_score, torch_score = SCORES[score]
    structure_heads = heads if differs or listed_heads > 1 else 1
    torch_spec = MaskSpec(bounds, is_causal, torch_mask, listed_bits, listed_q, listed_k)
    spec = torch_spec._replace(mask=kernel_mask)
    grid, near = Grid(q_len, kv_len, *block), Near(sink, local, min_length)
    visibility = structure_torch.block_structure(torch_spec, None, structure_heads, grid)
    candidates = structure_torch.candidate_blocks(visibility, bounds, is_causal, grid, near)
    structure = Structure(visibility, candidates)
    options = MassOptions(sub_block, pool, sample, bits)
    mean = reference.key_mean(key, bounds, 128)
    thresholds = torch.full((heads,), threshold)
    return SimpleNamespace(**locals(), scale=dim**-0.5)


def asked(s: SimpleNamespace) -> torch.Tensor:
    """The candidates, bool ``[B, Hq, nq, nk]``."""
    counts, blocks = s.structure.candidates.counts, s.structure.candidates.blocks
    slot = torch.arange(s.grid.key_blocks)
    listed = (slot >= counts[..., :1]) & (slot < counts.sum(-1, keepdim=True))
    # What is no candidate goes to a column that is cut off.
    column = torch.where(listed, blocks, s.grid.key_blocks).long()
    flags = torch.zeros(*blocks.shape[:3], s.grid.key_blocks + 1, dtype=torch.bool).scatter_(-1, column, True)
    return flags[..., :-1].expand(-1, s.heads, -1, -1)


SEEN = [
    {},
    {"mask": "window"},
    {"mask": "window", "is_causal": False},
    {"mask": "documents", "is_causal": False, "block": (64, 32)},
    {"mask": "by head", "heads": 3, "block": (128, 64)},
    {"is_causal": False, "block": (128, 128), "q_len": 300},
    {"q_len": 150, "kv_range": ((0, 330), (77, 310)), "batch": 2, "mask": "documents"},
    {"q_len": 350, "kv_len": 300, "kv_range": ((5, 290),)},
    {"listed": (64, 64), "kv_range": ((40, 330),)},
    {"listed": (32, 16), "mask": "window"},
    {"listed": (128, 256), "is_causal": False, "listed_heads": 2},
    {"listed": (100, 48), "block": (64, 32)},
]
"""Calls that differ in who sees whom."""


def names(options: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items()) or "causal"
