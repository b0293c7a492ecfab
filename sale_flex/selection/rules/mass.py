# SPDX-License-Identifier: BSD-3-Clause
"""The largest row mass: the share of a row's softmax that falls on a block (docs/semantics.md, "The mass rule").

A block is hit when that share, estimated in low bits from every key or from the mean and the variance of sub-blocks of
keys, reaches the threshold in one of the query block's scored rows.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from sale_flex import ops
from sale_flex.blocks.bits import pack_bits, unpack_bits
from sale_flex.kernels.arguments import KeyMoments, MassOptions, Structure
from sale_flex.selection.key_codes import Coded, Form, code_rest
from sale_flex.selection.rules.base import BITS, Rule, Selection, check_count, check_one_of, register_rule

if TYPE_CHECKING:
    from sale_flex.call.facts import Call

POOLS = (1, 2, 4, 8, 16)
POOL_MODES = ("last", "mean")
SUB_BLOCKS = (1, 4, 8, 16, 32, 64)


@register_rule
@dataclass(frozen=True, eq=False)
class Mass(Rule):
    """Keep a block that takes `threshold` or more of some scored row's softmax. The default rule."""

    threshold: float | Tensor = 0.01
    """A share of a row's probability; 1 and more keep only what is always kept."""

    pool: int = 4
    """Adjacent queries that one scored row stands for, in rows: 1, 2, 4, 8 or 16."""

    pool_mode: str = "last"
    """``"last"``: it is the last of them, alone. ``"mean"``: it is their mean, which is flatter than any of them, and
    not safe on every model (see `fast`)."""

    sub_block: int = 1
    """Keys that are estimated together, by their mean and variance: 4, 8, 16, 32 or 64, at most the keys of a block;
    1 takes every key by itself, in codes of rotated channels."""

    bits: int = 8
    """Width of the codes: 8 (values in [-127, 127]) or 4 ([-7, 7]). Both travel in int8, so both cost the same time;
    stored codes of earlier chunks' keys (`KeyCodes`) take half the memory in 4 bits."""

    max_blocks: int | None = None
    """Room in a query block's index list, in blocks. Where more pass the threshold, those with the largest mass are
    kept and the others counted (`SaleStats.dropped_blocks`). None: all of them on short prompts and for thresholds
    given per head, otherwise what bounds the lists' memory (docs/semantics.md, "Index lists")."""

    name: ClassVar[str] = "mass"
    gives_up: ClassVar[bool] = True

    @classmethod
    def fast(cls, threshold: float | Tensor = 0.005, **options: Any) -> Self:
        """The cheapest estimate, for models on which it was measured: moments of 8 keys, 4 queries averaged, 4 bits.

        It chooses blocks in half of the default's time at 32K tokens and a fifth at 128K, and is **not safe on every
        model**: where queries differ from token to token, as those of models that normalise them do, averages and
        moments hide what single keys weigh. On Gemma 3 270M at 32K tokens it raises the loss by 0.058 (the default: by
        nothing). Compare the loss of your model on your text with and without it first.

        Args:
            threshold: As the field; averaged rows are flatter than single ones, and want a lower one.
            options: Other fields.
        """
        chosen: dict[str, Any] = {"pool": 4, "pool_mode": "mean", "sub_block": 8, "bits": 4}
        return cls(threshold=threshold, **(chosen | options))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("pool", self.pool, POOLS, "rows")
        check_one_of("pool_mode", self.pool_mode, POOL_MODES)
        check_one_of("sub_block", self.sub_block, SUB_BLOCKS, "keys")
        check_one_of("bits", self.bits, BITS)
        if self.max_blocks is not None:
            check_count("max_blocks", self.max_blocks, 1, "blocks")

    @property
    def averages(self) -> bool:
        """Whether averages of keys stand for single ones: not safe on every model, see `fast`."""
        return self.sub_block > 1

    def check_blocks(self, block_size: tuple[int, int]) -> None:
        """Raise ValueError if a sub-block has no room in a block."""
        if self.sub_block > block_size[1]:
            raise ValueError(
                f"sub_block must be at most the {block_size[1]} keys of a block, got {self.sub_block}; take a smaller "
                "sub_block or a larger block_size."
            )

    def codes(self, call: "Call") -> tuple[Tensor, KeyMoments]:
        """The smoothing mean, and codes and scales of the keys, or of sub-blocks' means and variances."""
        key, bounds = call.key, call.bounds
        mean = ops.key_mean(key, bounds, call.config.smooth_tokens)
        sub_block = self._sub_block(call)
        if call.reuse is None:
            return mean, ops.quantize_moments(key, mean, bounds, call.grid.block_k, sub_block, self.bits)
        return mean, _codes_of_both(self, call, mean, sub_block)

    def select(self, call: "Call", codes: tuple[Any, ...], structure: Structure | None) -> Selection:
        """Hit bits, and hits given up; see `Rule.select`."""
        mean, moments = codes
        return Selection(
            *ops.mass_hits(
                call.query,
                call.key,
                mean,
                moments,
                call.spec,
                structure,
                call.score,
                call.threshold,
                call.scale,
                call.grid,
                self.mass_options(call),
                call.near,
                call.room.budget,
            )
        )

    def scores(self, call: "Call", structure: Structure | None = None) -> Tensor:
        """Scores on `sale_flex.selection.rules.ladder.LADDER`; see `Rule.scores`."""
        from sale_flex.selection.rules.mass_scores import (
            block_scores,  # here: of all there is, only calibration wants it
        )

        return block_scores(self, call, structure)

    def mass_options(self, call: "Call") -> MassOptions:
        """How a call is estimated."""
        return MassOptions(self._sub_block(call), self.pool, self.pool_mode == "last", self.bits)

    def describe(self) -> str:
        """Options in a phrase."""
        keys = "every key" if self.sub_block == 1 else f"moments of {self.sub_block} keys"
        rows = f"every {self.pool}th row" if self.pool_mode == "last" else f"means of {self.pool} rows"
        return f"{self.name} of {keys}, {rows}, {self.bits} bits"

    def remark(self, call: "Call") -> str:
        """Whether single keys take the place of sub-blocks."""
        if self._sub_block(call) == self.sub_block:
            return ""
        return "every key is estimated by itself, as the score_mod wants it"

    def _sub_block(self, call: "Call") -> int:
        """Keys that are estimated together: one under a score_mod for which no other key can stand."""
        return 1 if call.masked is not None and call.masked.needs_scan else self.sub_block


def _codes_of_both(rule: Mass, call: "Call", mean: Tensor, sub_block: int) -> KeyMoments:
    """What `ops.quantize_moments` returns, from stored codes and from keys. NaN scales are the store's flags."""
    assert call.reuse is not None
    key, block_k, moments = call.key, call.grid.block_k, sub_block > 1

    def quantize(part: Tensor, where: Tensor) -> list[Coded]:
        *made, nonfinite = ops.quantize_moments(part, mean, where, block_k, sub_block, rule.bits)
        blocks = -(-part.shape[2] // block_k)
        made[1][..., :blocks].masked_fill_(unpack_bits(nonfinite, blocks), torch.nan)
        return [Coded(*made[:2]), Coded(*made[2:])][: 1 + moments]

    made_with: dict[str, object] = {"rule": rule.name, "sub_block": sub_block, "bits": rule.bits}
    made_with |= {"block_size": call.config.block_size, "smooth_tokens": call.config.smooth_tokens}
    form = Form(made_with, (block_k // sub_block,) * (1 + moments), (True, False)[: 1 + moments], 256, by_group=False)
    made, stale = code_rest(call.reuse, key, mean, call.bounds, form, quantize)
    flags = made[0].scale.isnan()
    of_means = made[0]._replace(scale=made[0].scale.masked_fill(flags, 0.0))
    none = key.new_empty(*key.shape[:2], 0, key.shape[3], dtype=torch.int8)
    of_variances = made[1] if moments else Coded(none, none.new_empty(none.shape[:3], dtype=torch.float32))
    flags = flags[..., : call.grid.key_blocks]
    if stale is not None:
        # One block's sum is a part of every row's total: a wrong one could lose the others.
        flags = flags | stale.any(-1, keepdim=True)
    return KeyMoments(*of_means, *of_variances, pack_bits(flags))
