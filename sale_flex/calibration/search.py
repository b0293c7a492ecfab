# SPDX-License-Identifier: BSD-3-Clause
"""The largest threshold of every head whose output stays near dense attention's, for one attention call."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sale_flex import ops
from sale_flex.attention import sale_attention
from sale_flex.bits import pack_bits
from sale_flex.block_mask import EVERY_ROW, from_lists, make_bounds
from sale_flex.break_even import early_rows
from sale_flex.calibration.goal import Goal
from sale_flex.calibration.scores import block_scores
from sale_flex.config import SaleConfig
from sale_flex.flex import run_flex
from sale_flex.index_lists import build_index_lists, list_widths
from sale_flex.mask_mods import visible

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
        self.dense = self._attend(replace(config, threshold=0.0, min_length=EVERY_ROW))
        if not bool(self.dense.isfinite().all()):
            raise ValueError(
                "the dense output must be finite to be calibrated against, got infinities or NaN; take another dtype, "
                "or look for what is wrong with the model or the text."
            )

    def _attend(self, config: SaleConfig) -> Tensor:
        return sale_attention(*self._tensors, config, **self._options)

    def has_choice(self) -> bool:
        """Whether there is a block that is not kept in any case; not so where ``min_length`` makes all rows dense."""
        least = replace(self._config, metric="mass", threshold=1.0, max_blocks=None)
        stats = sale_attention(*self._tensors, least, stats=True, **self._options).stats
        return bool((stats.kept_blocks < stats.visible_blocks).any())

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
                for thresholds of `sale_flex.calibration.scores.LADDER`.
        """
        mods = ("score_mod", "mask_mod", "block_mask", "sink_logits")
        plain = all(self._options.get(name) is None for name in mods) and self._options.get("causal", True)
        if by_scores and plain and self._config.max_blocks is None:
            return self._attend_by_scores()
        return lambda thresholds: self._attend(replace(self._config, threshold=thresholds))

    def _attend_by_scores(self) -> Attend:
        query, key, value = self._tensors
        bounds, scale = self._bounds(), self._options.get("scale")
        scale = query.shape[3] ** -0.5 if scale is None else scale
        scores = block_scores(query, key, self._config, bounds, scale)
        nonfinite = ops.nonfinite_blocks(value, bounds, self._config.block_size[1])
        min_length = early_rows(query, self._config)
        from_zero = self._options.get("kv_range") is None
        mask_mod = visible(bounds)

        def attend(thresholds: Tensor) -> Tensor:
            config = replace(self._config, threshold=thresholds)
            widths = list_widths(query, key.shape[2], config, min_length, from_zero)
            hits = pack_bits(scores >= thresholds[:, None, None])
            lists = build_index_lists(
                hits, nonfinite, bounds, query, key, config, min_length, widths, want_kept=False, leave_early=False
            )
            mask = from_lists(lists, config.block_size, mask_mod, (query.shape[2], key.shape[2]))
            return run_flex(query, key, value, mask, scale, self._options.get("kernel_options"))[0]

        return attend

    def measure(self, config: SaleConfig, error: str) -> Measured:
        """What `sale_attention` comes to with `config`, threshold included."""
        output, stats = sale_attention(*self._tensors, config, stats=True, **self._options)
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
