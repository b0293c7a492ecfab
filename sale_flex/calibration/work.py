# SPDX-License-Identifier: BSD-3-Clause
"""The stages of a calibration, each of which goes on where its record ends: search, measure, weigh."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sale_flex.attention import sale_attention
from sale_flex.calibration.artefact import Calibration, with_thresholds
from sale_flex.calibration.evaluation import Evaluation, Text
from sale_flex.calibration.goal import Goal
from sale_flex.calibration.model import mean_loss, run
from sale_flex.calibration.record import Record
from sale_flex.calibration.search import Call, find_thresholds
from sale_flex.calibration.texts import Tokens
from sale_flex.config import SaleConfig

if TYPE_CHECKING:
    from sale_flex._console.progress import Lines


class Work:
    """The texts of one calibration or evaluation.

    Args:
        model: A causal language model that is `prepared`.
        layers: ``layer_idx`` -> query heads.
        texts: What it reads.
        config: Rule, blocks and estimate.
        goal: Error allowed, and the search.
        record: What is known already, and what is found.
    """

    def __init__(
        self,
        model: Any,
        layers: Mapping[int, int],
        texts: Sequence[Tokens],
        config: SaleConfig,
        goal: Goal,
        record: Record,
    ) -> None:
        self.model, self.layers, self.texts = model, layers, texts
        self.config, self.goal, self.record = config, goal, record

    def steps(self, search: bool) -> int:
        """What is left to do, with a search or without, if no threshold has to be lowered."""
        record, each = self.record, len(self.texts) * len(self.layers)
        known = sum(map(len, record.measured)) + (sum(map(len, record.found)) if search else 0)
        return (2 if search else 1) * each - known + record.losses.count([])

    def calibrate(self, settings: Mapping[str, Any], meter: "Lines") -> Calibration:
        """Search, measure and weigh."""
        self.search(meter)
        thresholds = self.lowest()
        self.measure(thresholds, meter, lower=True)
        self.weigh(thresholds, meter)
        return Calibration(
            config=self.config,
            thresholds=torch.stack(list(thresholds.values())),
            layers=tuple(self.layers),
            goal=self.goal,
            on=self.evaluation(),
            unused=tuple(n for n in self.layers if all(found[str(n)] is None for found in self.record.found)),
            **{name: settings[name] for name in ("model", "revision", "dtype", "device", "weights", "versions")},
        )

    def evaluate(self, thresholds: dict[int, Tensor], meter: "Lines") -> Evaluation:
        """Measure and weigh thresholds as they are."""
        self.measure(thresholds, meter, lower=False)
        self.weigh(thresholds, meter)
        return self.evaluation()

    def search(self, meter: "Lines") -> None:
        """Thresholds of every text and layer that is not searched yet."""
        for n, (text, found) in enumerate(zip(self.texts, self.record.found)):
            if len(found) == len(self.layers):
                continue

            def observe(call: Any, n: int = n, found: dict[str, Any] = found) -> Tensor:
                mine = Call(call.query, call.key, call.value, self.config, call.options)
                if str(call.layer) not in found:
                    meter.begin(f"{self._name(n)}, layer {call.layer}: thresholds")
                    thresholds = find_thresholds(mine, self.goal)
                    found[str(call.layer)] = None if thresholds is None else thresholds.tolist()
                    self.record.save()
                    meter.finish("")
                return mine.dense

            run(self.model, text, self.layers, observe)

    def lowest(self) -> dict[int, Tensor]:
        """Every head's smallest threshold over the texts, those already lowered included; 0 where none is known."""
        thresholds = {}
        for layer, heads in self.layers.items():
            found = [text[str(layer)] for text in self.record.found]
            found += [text[str(layer)]["thresholds"] for text in self.record.measured if str(layer) in text]
            known = [torch.tensor(each, dtype=torch.float32) for each in found if each is not None]
            thresholds[layer] = torch.stack(known).amin(0) if known else torch.zeros(heads)
        return thresholds

    def measure(self, thresholds: dict[int, Tensor], meter: "Lines", lower: bool) -> None:
        """What `thresholds` come to, by `sale_attention`.

        Args:
            thresholds: Layer -> float32 ``[Hq]``.
            meter: Who is told.
            lower: Whether to lower thresholds, a step at a time, where an error is above the target. What was measured
                with others is then measured again.
        """

        def stale(n: int) -> list[int]:
            known = self.record.measured[n]
            return [
                layer
                for layer, each in thresholds.items()
                if str(layer) not in known or known[str(layer)]["thresholds"] != each.tolist()
            ]

        while any(stale(n) for n in range(len(self.texts))):
            for n, text in enumerate(self.texts):
                wanted = stale(n)
                if not wanted:
                    continue

                def observe(call: Any, n: int = n, wanted: list[int] = wanted) -> Tensor:
                    mine = Call(call.query, call.key, call.value, self.config, call.options)
                    if call.layer in wanted:
                        meter.begin(f"{self._name(n)}, layer {call.layer}: error")
                        thresholds[call.layer], self.record.measured[n][str(call.layer)] = self._measure_layer(
                            mine, thresholds[call.layer], lower
                        )
                        self.record.save()
                        meter.finish("")
                    return mine.dense

                run(self.model, text, self.layers, observe)

    def _measure_layer(self, call: Call, thresholds: Tensor, lower: bool) -> tuple[Tensor, dict[str, Any]]:
        steps = self.goal.steps()
        while True:
            here = with_thresholds(self.config, thresholds.to(call.device))
            errors, kept, visible = (x.cpu() for x in call.measure(here, self.goal.error))
            over = ~(errors <= self.goal.target) & (thresholds > 0)
            if not (lower and bool(over.any())):
                break
            thresholds = torch.where(over, steps.lower(thresholds), thresholds)
        return thresholds, {
            "thresholds": thresholds.tolist(),
            "errors": errors.tolist(),
            "kept": kept.tolist(),
            "visible": visible.tolist(),
        }

    def weigh(self, thresholds: Mapping[int, Tensor], meter: "Lines") -> None:
        """The loss of every text, with dense attention and with `thresholds` in every layer."""

        def dense(call: Any) -> Tensor:
            return Call(call.query, call.key, call.value, self.config, call.options).dense

        def sparse(call: Any) -> Tensor:
            config = with_thresholds(self.config, thresholds[call.layer].to(call.query.device))
            return sale_attention(call.query, call.key, call.value, config, **call.options)

        for n, text in enumerate(self.texts):
            if self.record.losses[n]:
                continue
            meter.begin(f"{self._name(n)}: loss")
            losses = []
            for observer in (dense, sparse):
                loss, count = mean_loss(self.model, run(self.model, text, self.layers, observer), text)
                losses.append(loss)
            self.record.losses[n] = [*losses, count]
            self.record.save()
            meter.finish("")

    def evaluation(self) -> Evaluation:
        """All of it, when all is done."""

        def table(name: str) -> Tensor:
            rows = [[text[str(layer)][name] for layer in self.layers] for text in self.record.measured]
            return torch.tensor(rows, dtype=torch.float64)  # [texts, layers, heads]

        texts = (
            Text(text.sha256, text.shape, count, dense, sparse)
            for text, (dense, sparse, count) in zip(self.texts, self.record.losses)
        )
        densities = table("kept").sum(0) / table("visible").sum(0)
        return Evaluation(table("errors").amax(0).float(), densities.float(), tuple(texts))

    def _name(self, n: int) -> str:
        return f"text {n + 1} of {len(self.texts)}"
