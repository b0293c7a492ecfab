# SPDX-License-Identifier: BSD-3-Clause
"""The relative attention score of single elements: SALE as published (arXiv 2505.24179, section 3.2).

A block is hit when one of its elements, estimated in low bits, reaches ``m_i + ln(threshold * l_i)``, with m and l the
exact softmax statistics of the row's sink and local keys.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sale_flex import ops
from sale_flex.kernels.arguments import Structure
from sale_flex.selection.key_codes import Coded, Form, code_rest
from sale_flex.selection.rules.base import BITS, Rule, Selection, check_one_of, register_rule

if TYPE_CHECKING:
    from sale_flex.call.facts import Call


@register_rule
@dataclass(frozen=True, eq=False)
class Relative(Rule):
    """Keep a block with an element that reaches `threshold` relative to the row's sink-local softmax, as published."""

    threshold: float | Tensor = 0.004
    """A ratio of exponentials; 0.004 to 0.032 are usual."""

    bits: int = 4
    """Width of the codes: 4 (values in [-7, 7]) as published, or 8 ([-127, 127])."""

    name: ClassVar[str] = "relative"
    threshold_range: ClassVar[tuple[float, float]] = (1e-8, 1e4)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("bits", self.bits, BITS)

    def codes(self, call: "Call") -> tuple[Tensor, ...]:
        """The smoothing mean, codes and scales of the keys."""
        key, bounds, block_k = call.key, call.bounds, call.grid.block_k
        mean = ops.key_mean(key, bounds, call.config.smooth_tokens)

        def quantize(part: Tensor, where: Tensor) -> list[Coded]:
            return [Coded(*ops.quantize_groups(part, mean, where, block_k, self.bits, False))]

        if call.reuse is None:
            return mean, *quantize(key, bounds)[0]
        made_with: dict[str, object] = {"rule": self.name, "bits": self.bits}
        made_with |= {"block_size": call.config.block_size, "smooth_tokens": call.config.smooth_tokens}
        form = Form(made_with, (block_k,), (True,), 128, by_group=True)
        (of_keys,), stale = code_rest(call.reuse, key, mean, bounds, form, quantize)
        if stale is None:
            return mean, *of_keys
        return mean, of_keys.codes, _spoil(of_keys.scale, stale, bounds[:, 1], block_k)

    def select(self, call: "Call", codes: tuple[Any, ...], structure: Structure | None) -> Selection:
        """Hit bits, and hits given up; see `Rule.select`."""
        mean, key_codes, key_scale = codes
        query_codes, query_scale = ops.quantize_rows(call.query, self.bits, False)
        limit, shift = ops.row_limits(
            call.query,
            query_scale,
            call.key,
            mean,
            call.spec,
            structure,
            call.score,
            call.threshold,
            call.scale,
            call.grid,
            call.near,
        )
        hits = ops.scan_max(
            query_codes,
            query_scale,
            key_codes,
            key_scale,
            limit,
            shift,
            call.spec,
            structure,
            call.score,
            call.scale,
            call.grid,
            call.config.local_tokens,
            call.no_left_padding,
        )
        return Selection(hits)

    def scores(self, call: "Call", structure: Structure | None = None) -> Tensor:
        """Scores on `sale_flex.selection.rules.ladder.LADDER`; see `Rule.scores`."""
        from sale_flex.selection.rules.relative_scores import (
            block_scores,  # here: of all there is, only calibration wants it
        )

        return block_scores(self, call, structure)

    def describe(self) -> str:
        """Options in a phrase."""
        return f"{self.name}, {self.bits} bits"


def _spoil(scale: Tensor, stale: Tensor, start: Tensor, block_k: int) -> Tensor:
    """Scales ``[B, Hkv, G]`` with NaN, which keeps a block, in groups that reach into stale blocks ``[B, Hkv, N]``.

    Groups are counted from the first valid key, `start` int32 ``[B]``, and blocks from key 0. Where all blocks are
    stale, the count itself may be wrong.
    """
    group = torch.arange(scale.shape[2], device=scale.device)
    beyond = stale.shape[2]
    flags = torch.cat([stale, torch.zeros_like(stale[..., :1])], -1)
    spoiled = stale.all(-1, keepdim=True)
    for shift in (start // block_k, (start + block_k - 1) // block_k):
        block = (group + shift[:, None]).clamp_max(beyond)[:, None].expand_as(scale)
        spoiled = spoiled | flags.gather(2, block)
    return scale.masked_fill(spoiled, torch.nan)
