# SPDX-License-Identifier: BSD-3-Clause
"""What a calibration is to reach, and the thresholds that it may choose from."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sale_flex.selection.rules.ladder import LADDER

ERRORS = ("relative", "absolute")
SEARCHES = ("bisection", "halving")

FIRST_HALVED, LAST_HALVED = 0.008, 1e-4
"""Where halving begins, and the threshold from which down a head is dense (arXiv 2505.24179, section 3.3)."""


class Steps(NamedTuple):
    """Thresholds that a search chooses from."""

    values: Tensor
    """float32 ``[N]``, ascending; the first is 0, a dense head."""

    def lower(self, thresholds: Tensor) -> Tensor:
        """The next lower step of each threshold, float32 ``[Hq]``; 0 of 0."""
        at = torch.searchsorted(self.values, thresholds.to(self.values))
        return self.values[(at - 1).clamp_min(0)]


@dataclass(frozen=True)
class Goal:
    """The error that heads may have, and how the largest threshold within it is searched.

    Raises:
        ValueError: A field is outside its range; the message names it.
    """

    target: float
    """The largest error of a head's output, beside dense attention's, on any text."""

    error: str = "relative"
    """``"relative"``: ``|o - o_dense|`` summed over channels and tokens, as a share of ``|o_dense|`` summed alike.
    ``"absolute"``: summed over channels and averaged over tokens, as published (arXiv 2505.24179, section 3.3)."""

    search: str = "bisection"
    """``"bisection"`` of `sale_flex.selection.rules.ladder.LADDER`, or ``"halving"`` as published: from 0.008 until the
    error is within the target; a threshold of 1e-4 or less makes the head dense."""

    def __post_init__(self) -> None:
        if isinstance(self.target, bool) or not isinstance(self.target, (int, float)):
            raise TypeError(f"target must be a float, the largest error of a head, got {self.target!r}.")
        if not (math.isfinite(self.target) and self.target > 0):
            raise ValueError(f"target must be above 0 and finite, got {self.target!r}; 0.05 is usual.")
        if self.error not in ERRORS:
            raise ValueError(f"error must be one of {ERRORS}, got {self.error!r}.")
        if self.search not in SEARCHES:
            raise ValueError(f"search must be one of {SEARCHES}, got {self.search!r}.")

    def steps(self, device: torch.device | str = "cpu") -> Steps:
        """What the search chooses from."""
        if self.search == "bisection":
            return Steps(torch.tensor([0.0, *LADDER], device=device))
        halved = [FIRST_HALVED]
        while halved[-1] / 2 > LAST_HALVED:
            halved.append(halved[-1] / 2)
        return Steps(torch.tensor([0.0, *reversed(halved)], device=device))
