# SPDX-License-Identifier: BSD-3-Clause
"""Pass or fail: whether a rule costs a model more than it may, and which setting does not."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sale_flex.config import SaleConfig
from sale_flex.eval.run import Outcome
from sale_flex.selection.rules import Mass


@dataclass(frozen=True)
class Verdict:
    """What a quick evaluation ends with."""

    asked: Outcome
    """Of the rule asked for."""
    max_rise: float
    tried: tuple[Outcome, ...]
    """Settings that keep more, in the order in which they were tried, up to the first that passes."""
    setting: SaleConfig | None
    """The one that passes; None if none did."""

    @property
    def passes(self) -> bool:
        """Whether the rule asked for does."""
        return holds(self.asked, self.max_rise)

    def describe(self) -> str:
        """In a few lines."""
        lines = [self._line(self.asked)]
        if self.asked.density is None:
            lines.append("No layer chose blocks: the sequences are shorter than min_length; nothing was tested.")
        elif self.passes and self.asked.rise.high > self.max_rise:
            lines.append("The interval reaches beyond what is allowed: more text would tell.")
        lines += [self._line(outcome) for outcome in self.tried]
        if not self.passes and self.setting is None:
            lines.append("No setting that was tried passes: leave this model dense, or calibrate it.")
        return "\n".join(lines)

    def _line(self, outcome: Outcome) -> str:
        word = "PASS" if holds(outcome, self.max_rise) else "FAIL"
        density = "dense" if outcome.density is None else f"density {outcome.density:.3f}"
        miss = "" if outcome.miss is None else f", the worst head missed {outcome.miss:.2f}"
        return (
            f"{word} {outcome.rule}: rise in loss {outcome.rise} at {outcome.tokens} tokens, at most "
            f"{self.max_rise:g} allowed; {density}{miss}"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "passes": self.passes,
            "max_rise": self.max_rise,
            "asked": as_json(self.asked),
            "tried": [as_json(outcome) for outcome in self.tried],
        }


def as_json(outcome: Outcome) -> dict[str, Any]:
    """An outcome's fields, as JSON takes them."""
    return outcome._asdict() | {"rise": outcome.rise._asdict()}


def holds(outcome: Outcome, max_rise: float) -> bool:
    """Whether a rise is no more than allowed; one that is not finite is more."""
    return outcome.rise.mean <= max_rise


def judge(label: str, config: SaleConfig, max_rise: float, measure: Callable[[str, SaleConfig], Outcome]) -> Verdict:
    """Measure a rule, and if it fails settings that keep more, until one passes.

    Args:
        label: The rule's.
        config: The rule.
        max_rise: Largest rise in mean loss, in nats.
        measure: What a label and a config come to.
    """
    asked = measure(label, config)
    tried: list[Outcome] = []
    if holds(asked, max_rise):
        return Verdict(asked, max_rise, (), config)
    for name, other in safer(label, config):
        tried.append(measure(name, other))
        if holds(tried[-1], max_rise):
            return Verdict(asked, max_rise, tuple(tried), other)
    return Verdict(asked, max_rise, tuple(tried), None)


def safer(label: str, config: SaleConfig) -> Iterator[tuple[str, SaleConfig]]:
    """Settings that keep more than one, from the cheapest on: label and config."""
    rule = config.rule
    if isinstance(rule, Mass) and rule.averages:
        config = config.with_options(sub_block=1, pool_mode="last", bits=8, threshold=Mass().threshold)
        yield "default", config
        label = "default"
    if isinstance(rule.threshold, float):
        for divisor in (2, 4):
            threshold = config.rule.threshold / divisor
            yield f"{label}:{threshold:g}", config.with_threshold(threshold)
    if isinstance(rule, Mass):
        for pool in (2, 1):
            if pool < config.rule.options()["pool"]:
                yield f"{label}/pool={pool}", config.with_options(pool=pool)
    if config.on_miss != "dense":
        yield f"{label}/on_miss=dense", config.with_options(on_miss="dense")
