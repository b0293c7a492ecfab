# SPDX-License-Identifier: BSD-3-Clause
"""What 4 and 8 bits, smoothing, and a rotation do to the choice of blocks where keys have outlier channels.

In large models a few channels of the keys are many times the rest. A code's scale has to cover them, and the other
channels, which tell keys apart, get what is left of 4 bits. The tensors are synthetic (`sale_flex.bench.generator`),
with and without such channels, and the attention of both is the same. For every variant of the estimate, and for the
choice that exact masses would make:

* density: kept over visible blocks, of all heads;
* mass kept: the share of a row's exact softmax that falls on kept blocks, mean over rows and heads;
* pooled mass kept: the same of the pooled rows, which is what the rule estimates;
* needles kept: of the rows that seek one key far away, the share whose key lies in a kept block, at a distance that is
  not kept anyway. A single row seeks it, so four rows pooled hide it even from exact masses (`--query-pool 1`), and one
  key among eight hides in their moments (`--estimator scan`).

A rotation is an orthogonal matrix that queries and keys are multiplied by: it changes no logit, and spreads a channel
over all of them.

    python examples/outlier_channels.py --length 8192
"""

import argparse
import math
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sale_flex import Mass, SaleConfig, create_sale_block_mask
from sale_flex.bench.generator import Generated, generate
from sale_flex.bench.inputs import Inputs
from sale_flex.bench.threshold import find_threshold
from sale_flex.testing import block_map

MIN_LENGTH = 1024  # tokens; the first rows keep everything in every variant, and are left out of the figures


class Exact(NamedTuple):
    """What every block holds in truth, float32 ``[Hq, rows, nk]``; rows from `MIN_LENGTH` on."""

    rows: Tensor
    pooled: Tensor


class Variant(NamedTuple):
    """One line of the table."""

    outliers: int
    bits: int
    smooth_tokens: int
    rotation: str


def variants(outliers: int) -> Iterator[Variant]:
    """The lines, those without outliers first."""
    yield Variant(0, 4, 1024, "none")
    yield Variant(0, 8, 1024, "none")
    for rotation in ("none", "Hadamard", "random"):
        for bits in (4, 8):
            for smooth_tokens in (0, 1024):
                yield Variant(outliers, bits, smooth_tokens, rotation)


def rotation_matrix(kind: str, dim: int) -> Tensor:
    """An orthogonal matrix, float32 ``[dim, dim]``; Hadamard's, with random signs, exists for powers of two."""
    generator = torch.Generator().manual_seed(1)
    if kind == "random":
        return torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
    matrix = torch.ones(1, 1)
    while len(matrix) < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.randint(2, (dim, 1), generator=generator) * 2 - 1
    return signs * matrix / math.sqrt(dim)


def rotate(made: Generated, kind: str) -> Inputs:
    """Queries and keys in another basis."""
    dim = made.query.shape[3]
    matrix = torch.eye(dim) if kind == "none" else rotation_matrix(kind, dim)
    return Inputs(made.query @ matrix, made.key @ matrix, made.value, dim**-0.5)


def exact_masses(made: Generated, config: SaleConfig) -> Exact:
    """Share of the softmax of every row, and of every pooled row, that falls on each block of keys."""
    heads = made.query.shape[1]
    group = heads // made.key.shape[1]
    rows, pooled = [], []
    for head in range(heads):
        keys = made.key[0, head // group]
        rows.append(_block_masses(made.query[0, head, MIN_LENGTH:], keys, MIN_LENGTH, 1, config))
        means = made.query[0, head, MIN_LENGTH:].unflatten(0, (-1, config.rule.pool)).mean(1)
        pooled.append(_block_masses(means, keys, MIN_LENGTH, config.rule.pool, config))
    return Exact(torch.stack(rows), torch.stack(pooled))


def _block_masses(rows: Tensor, keys: Tensor, first: int, pool: int, config: SaleConfig) -> Tensor:
    """Masses ``[R, nk]`` of rows that stand for `pool` tokens each and see the keys up to the last of them."""
    masses = []
    for at in range(0, len(rows), 1024):
        part = rows[at : at + 1024]
        position = first + pool * (torch.arange(at, at + len(part)) + 1) - 1
        logits = part @ keys.T * keys.shape[1] ** -0.5
        logits.masked_fill_(torch.arange(len(keys)) > position[:, None], -math.inf)
        masses.append(logits.softmax(-1).unflatten(1, (-1, config.block_size[1])).sum(-1))
    return torch.cat(masses)


def needle_blocks(made: Generated, config: SaleConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Head, query block and key block of every needle that is not kept whatever the estimate says."""
    block_q, block_k = config.block_size
    head, row = (made.needles[0] >= 0).nonzero().unbind(1)
    key = made.needles[0, head, row].long()
    first_row = row // block_q * block_q
    far = (key // block_k + 1) * block_k <= first_row - config.local_tokens
    chosen = far & (first_row >= MIN_LENGTH) & (key // block_k * block_k >= config.sink_tokens)
    return head[chosen], row[chosen] // block_q, key[chosen] // block_k


def choose_exactly(made: Generated, config: SaleConfig, exact: Exact) -> Tensor:
    """The blocks that the rule would keep if its masses were exact, bool ``[Hq, nq, nk]``."""
    always = create_sale_block_mask(made.query, made.key, config.with_options(threshold=1.0))
    kept = block_map(always).kept[0]
    rows = config.block_size[0] // config.rule.pool
    kept[:, MIN_LENGTH // config.block_size[0] :] |= (
        exact.pooled.ge(config.rule.threshold).unflatten(1, (-1, rows)).any(2)
    )
    return kept


def line(name: str, kept: Tensor, exact: Exact, needles: tuple[Tensor, Tensor, Tensor]) -> str:
    """A line of the table, of the kept blocks ``[Hq, nq, nk]``."""
    blocks = kept.shape[1]
    first = blocks - blocks * exact.rows.shape[1] // (exact.rows.shape[1] + MIN_LENGTH)
    figures = [kept.sum() / (len(kept) * blocks * (blocks + 1) / 2)]
    for masses in exact:
        of_rows = kept[:, first:].repeat_interleave(masses.shape[1] // (blocks - first), 1)
        figures.append((masses * of_rows).sum(-1).mean())
    figures.append(kept[needles].float().mean())
    return f"| {name} | {' | '.join(f'{figure:.4f}' for figure in figures)} |"


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--length", type=int, default=4096, help="tokens, a multiple of 64 above 1024")
    add("--outliers", type=int, default=4, help="outlier channels a KV head")
    add("--threshold", type=float, default=0.005, help="share of a row's probability")
    add("--density", type=float, help="search the threshold of every line that keeps this share of the blocks instead")
    add("--sub-block", type=int, default=8, help="keys estimated together; 1 takes every key by itself")
    add("--query-pool", type=int, default=SaleConfig().rule.pool, help="queries averaged to a pooled row")
    add("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.length % 64 or args.length <= MIN_LENGTH:
        parser.error(f"--length must be a multiple of 64 above {MIN_LENGTH}, got {args.length}")

    options = {"pool": args.query_pool, "sub_block": args.sub_block, "min_length": MIN_LENGTH}
    common = SaleConfig(Mass.fast(args.threshold)).with_options(**options)
    made = {count: generate(args.length, 8, 2, 128, outliers=count, seed=args.seed) for count in (0, args.outliers)}
    # Outliers change no softmax, and a rotation no logit: one truth for all.
    exact = exact_masses(made[0], common)
    needles = needle_blocks(made[0], common)
    print("| outliers | bits | smoothing | rotation | density | mass kept | pooled mass kept | needles kept |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    if args.density is None:
        print(line("exact masses | - | - | -", choose_exactly(made[0], common, exact), exact, needles))
    for variant in variants(args.outliers):
        inputs = rotate(made[variant.outliers], variant.rotation)
        config = common.with_options(bits=variant.bits, smooth_tokens=variant.smooth_tokens)
        if args.density is not None:
            config = find_threshold(inputs, config, args.density)
        mask = create_sale_block_mask(inputs.query, inputs.key, config)
        print(line(" | ".join(map(str, variant)), block_map(mask).kept[0], exact, needles))
    return 0


if __name__ == "__main__":
    sys.exit(main())
