# SPDX-License-Identifier: BSD-3-Clause
"""`stats(model)`: what every attention layer did since it was configured."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from sale_flex.integrations.transformers.layers import (
    DECODE,
    DENSE,
    SPARSE,
    LayerState,
    attention_layers,
    check_implementation,
    layer_states,
)
from sale_flex.stats import Audit


@dataclass(frozen=True)
class LayerStats:
    """What a layer did."""

    layer: int
    """Its index in the model."""
    sparse_calls: int
    """Prefill calls that chose blocks."""
    dense_calls: int
    """Prefill calls that ran dense; `paths` says why."""
    decode_calls: int
    """Calls of a few queries, which are dense."""
    density: tuple[float, ...]
    """Kept over visible blocks of every query head of this process, of all prefill; NaN before any."""
    dropped_blocks: int
    """Blocks above the threshold that found no room in their index list."""
    audited_rows: int
    """Rows that were asked exactly what they want, of every query head."""
    wanted_mass: tuple[float, ...]
    """Probability on blocks that a row wants (5 % and more, not always kept), of every head, the mean over audited
    rows; NaN before any."""
    missed_mass: tuple[float, ...]
    """Of that, what lies on blocks that were not kept."""
    miss: tuple[float, ...]
    """Share of it that was not kept, of every head (`sale_flex.stats.Audit.miss`); NaN before any audit. Above
    `SaleConfig.miss_bound` (0.2) a head's choice is not to be trusted."""
    made_dense: tuple[int, ...]
    """How often each head was made dense for what it missed (``on_miss="dense"``), in calls and their batch rows."""
    paths: dict[str, int]
    """How often what ran, as `SaleStats.describe` says it; without calls inside compiled programs."""
    mask_ms: float
    """Milliseconds spent on choosing blocks, in all; of the device on CUDA. Without compiled programs, as `paths`."""
    attention_ms: float
    """Milliseconds of prefill's attention, sparse and dense."""


@dataclass(frozen=True)
class ModelStats:
    """What a model's attention layers did. Prints as a table."""

    layers: tuple[LayerStats, ...]

    @property
    def density(self) -> float:
        """Mean over layers and heads; NaN before any prefill."""
        values = [value for layer in self.layers for value in layer.density]
        return sum(values) / len(values)

    @property
    def miss(self) -> float:
        """Of the head that missed most; NaN before any audit."""
        values = [value for layer in self.layers for value in layer.miss if value == value]
        return max(values, default=float("nan"))

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: what is not known is None."""
        return {"layers": [asdict(one) | _known(one) for one in self.layers]}

    def __str__(self) -> str:
        counts = f"{'layer':>5}  {'sparse':>6}  {'dense':>5}  {'decode':>6}  {'density':>7}  {'miss':>5}"
        lines = [f"{counts}  {'mask ms':>8}  {'attention ms':>12}  by head"]
        for one in self.layers:
            mean = sum(one.density) / len(one.density)
            heads = " ".join(f"{value:.2f}" for value in one.density)
            calls = f"{one.layer:>5}  {one.sparse_calls:>6}  {one.dense_calls:>5}  {one.decode_calls:>6}"
            lines.append(
                f"{calls}  {mean:>7.3f}  {max(one.miss):>5.2f}  {one.mask_ms:>8.2f}  {one.attention_ms:>12.2f}  {heads}"
            )
        return "\n".join(lines)


def stats(model: torch.nn.Module) -> ModelStats:
    """What the model's attention layers did since `configure` or `reset_stats`. Waits for the device.

    Raises:
        ValueError: `configure` was not called on the model, or a layer counted nothing and runs another
            attn_implementation by now.
    """
    layers = tuple(_read(index, state) for index, state in layer_states(model).items())
    idle = {one.layer for one in layers if one.sparse_calls + one.dense_calls + one.decode_calls == 0}
    check_implementation({index: module for index, module in attention_layers(model).items() if index in idle})
    return ModelStats(layers)


def reset_stats(model: torch.nn.Module) -> None:
    """Count from 0 again.

    Raises:
        ValueError: `configure` was not called on the model.
    """
    for state in layer_states(model).values():
        state.reset()


def _known(layer: LayerStats) -> dict[str, list[float | None]]:
    names = ("density", "wanted_mass", "missed_mass", "miss")
    shares = {name: getattr(layer, name) for name in names}
    return {name: [None if value != value else value for value in row] for name, row in shares.items()}


def _read(index: int, state: LayerState) -> LayerStats:
    calls = state.calls.tolist()
    kept, visible, dropped, audited, made_dense = state.blocks.tolist()
    wanted, missed, squares = state.masses
    of_rows = Audit(state.blocks[3], wanted, missed, squares, state.blocks[4])
    miss, wanted_mass, missed_mass = (
        tuple(value if asked else float("nan") for value, asked in zip(values.tolist(), audited))
        for values in (of_rows.miss, wanted / of_rows.rows, missed / of_rows.rows)
    )
    density = tuple(k / v if v else float("nan") for k, v in zip(kept, visible))
    times = state.clock.read()
    return LayerStats(
        index,
        calls[SPARSE],
        calls[DENSE],
        calls[DECODE],
        density,
        sum(dropped),
        audited[0],
        wanted_mass,
        missed_mass,
        miss,
        tuple(made_dense),
        dict(state.paths),
        times.get("mask", 0.0),
        times.get("attention", 0.0),
    )
