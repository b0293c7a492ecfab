# SPDX-License-Identifier: BSD-3-Clause
"""The largest threshold of every head whose output stays near dense attention's, for one attention call."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sale_flex import ops
from sale_flex.attention import AuxRequest, sale_attention
from sale_flex.blocks.bits import pack_bits
from sale_flex.calibration.goal import Goal
from sale_flex.call.facts import EVERY_ROW, check_arguments, make_bounds, settle
from sale_flex.call.facts import Call as SettledCall
from sale_flex.call.stages import Choice, block_mask, list_blocks
from sale_flex.call.user_mods import UserMods
from sale_flex.config import SaleConfig
from sale_flex.flex.run import run_flex
from sale_flex.kernels.arguments import Structure
from sale_flex.selection.rules import Rule, Selection
from sale_flex.stats import SaleStats

Attend = Callable[[Tensor], Tensor]
"""From thresholds float32 ``[Hq]`` to the output ``[B, Hq, Sq, D]``."""


class Measured(NamedTuple):
    """What one call comes to at some thresholds."""

    errors: Tensor
    """float64 ``[Hq]``: as `Goal.error` says, the largest of the batch rows."""
    kept: Tensor
    """int64 ``[Hq]``: blocks kept, of all batch rows."""
    visible: Tensor
    """int64 ``[Hq]``: blocks in which some query sees some key."""


@dataclass(frozen=True, eq=False)
class _Nothing(Rule):
    """Hits no block: what is left is what every rule keeps."""

    name: ClassVar[str] = "nothing"

    def select(self, call: SettledCall, codes: tuple[Any, ...], structure: Structure | None) -> Selection:
        grid = call.grid
        return Selection(call.bounds.new_zeros(*call.query.shape[:2], grid.query_blocks, grid.words))


class Call:
    """One attention call and its dense output.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``.
        value: ``[B, Hkv, Skv, D]``.
        config: Rule, blocks and estimate; its threshold is not used.
        options: Keyword arguments of `sale_attention` besides the config.

    Raises:
        ValueError: The dense output is not finite.
    """

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, config: SaleConfig, options: Mapping[str, Any] | None = None
    ) -> None:
        self._tensors, self._config, self._options = (query, key, value), config, dict(options or {})
        self.heads, self.device = query.shape[1], query.device
        self.dense = self._attend(replace(config.with_threshold(0.0), min_length=EVERY_ROW))
        if not bool(self.dense.isfinite().all()):
            raise ValueError(
                "the dense output must be finite to be calibrated against, got infinities or NaN; take another dtype, "
                "or look for what is wrong with the model or the text."
            )

    def _attend(self, config: SaleConfig) -> Tensor:
        return sale_attention(*self._tensors, config, **self._options)

    def has_choice(self) -> bool:
        """Whether there is a block that is not kept in any case; not so where ``min_length`` makes all rows dense."""
        stats = self._stats(replace(self._config, rule=_Nothing(0.0), on_miss="ignore"))[1]
        return bool((stats.kept_blocks < stats.visible_blocks).any())

    def _stats(self, config: SaleConfig) -> tuple[Tensor, SaleStats]:
        output, aux = sale_attention(*self._tensors, config, return_aux=AuxRequest(stats=True), **self._options)
        assert aux.stats is not None
        return output, aux.stats

    def errors(self, output: Tensor, error: str) -> Tensor:
        """Error of every head beside dense attention, float64 ``[Hq]``, the largest of the batch rows.

        Args:
            output: ``[B, Hq, Sq, D]``; 0 for padding.
            error: ``"relative"`` or ``"absolute"``, see `Goal`.
        """
        # A head at a time: float32 differences of all of them would be the largest tensors there are.
        pairs = list(zip(output.unbind(1), self.dense.unbind(1)))
        total = torch.stack([_sum((x.float() - dense.float()).abs()) for x, dense in pairs], 1)  # [B, Hq]
        size = self._tokens() if error == "absolute" else torch.stack([_sum(dense.abs()) for _, dense in pairs], 1)
        return torch.where(total == 0, 0.0, total / size).amax(0)

    def _tokens(self) -> Tensor:
        """Queries of every batch row that are no padding, ``[B, 1]``."""
        offset, start, end = self._bounds()[:, :, None].unbind(1)
        stop = torch.minimum(end, offset + self._tensors[0].shape[2])
        return (stop - torch.maximum(offset, start)).clamp_min(0)

    def _bounds(self) -> Tensor:
        query, key, _ = self._tensors
        return make_bounds(query, key, self._options.get("q_offset"), self._options.get("kv_range"))

    def attend(self, by_scores: bool) -> Attend:
        """What the call computes at given thresholds.

        Args:
            by_scores: Whether to choose blocks by one pass's scores, where that can be, instead of a scan every time:
                for thresholds of `sale_flex.selection.rules.ladder.LADDER`.
        """
        mods = ("score_mod", "mask_mod", "block_mask", "sink_logits")
        plain = all(self._options.get(name) is None for name in mods) and self._options.get("is_causal", True)
        if by_scores and plain and self._config.rule.max_blocks is None:
            return self._attend_by_scores()
        return lambda thresholds: self._attend(self._config.with_threshold(thresholds))

    def _attend_by_scores(self) -> Attend:
        query, key, value = self._tensors
        options = {name: self._options.get(name) for name in ("q_offset", "kv_range", "scale")}

        def settled(config: SaleConfig) -> SettledCall:
            given = check_arguments(query, key, value, config, UserMods(), **options, key_codes=None)
            return settle(given, lookup=False)

        call = settled(self._config)
        scores = call.rule.scores(call)
        nonfinite = ops.nonfinite_blocks(value, call.bounds, call.grid.block_k)

        def attend(thresholds: Tensor) -> Tensor:
            call = settled(self._config.with_threshold(thresholds))
            hits = pack_bits(scores >= thresholds[:, None, None])
            listed = list_blocks(call, None, Choice(Selection(hits), nonfinite, None))
            mask = block_mask(call, listed.lists)
            return run_flex(query, key, value, mask, call.scale, self._options.get("kernel_options"))[0]

        return attend

    def measure(self, config: SaleConfig, error: str) -> Measured:
        """What `sale_attention` comes to with `config`, threshold included."""
        output, stats = self._stats(config)
        return Measured(self.errors(output, error), stats.kept_blocks.sum(0), stats.visible_blocks.sum(0))


@torch.no_grad()
def find_thresholds(call: Call, goal: Goal) -> Tensor | None:
    """The largest threshold of every head with which its error stays within the target.

    A bisection takes errors to grow with the threshold, as they do but for noise: it finds a step that is within the
    target, and whose next is not.

    Args:
        call: The call.
        goal: Error allowed, and the search.

    Returns:
        float32 ``[Hq]``, 0 for a head that has to be dense; None where there is nothing to choose.
    """
    if not call.has_choice():
        return None
    attend = call.attend(by_scores=goal.search == "bisection")

    def fits(thresholds: Tensor) -> Tensor:
        return call.errors(attend(thresholds), goal.error) <= goal.target  # NaN does not

    return (_bisect if goal.search == "bisection" else _halve)(fits, goal, call)


def _bisect(fits: Callable[[Tensor], Tensor], goal: Goal, call: Call) -> Tensor:
    steps = goal.steps(call.device).values
    low = torch.zeros(call.heads, dtype=torch.long, device=call.device)
    high = torch.full_like(low, len(steps))
    while bool((high - low > 1).any()):
        middle = (low + high) // 2
        within = fits(steps[middle])
        low, high = torch.where(within, middle, low), torch.where(within, high, middle)
    return steps[low]


def _halve(fits: Callable[[Tensor], Tensor], goal: Goal, call: Call) -> Tensor:
    steps = goal.steps(call.device)
    thresholds = steps.values[-1].repeat(call.heads)
    while bool((over := ~fits(thresholds) & (thresholds > 0)).any()):
        thresholds = torch.where(over, steps.lower(thresholds), thresholds)
    return thresholds


def _sum(x: Tensor) -> Tensor:
    """Sum of ``[B, S, D]`` over rows and channels, float64 ``[B]``."""
    return x.sum((1, 2), dtype=torch.float64)
