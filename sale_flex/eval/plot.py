# SPDX-License-Identifier: BSD-3-Clause
"""Pictures of an evaluation, as SVG: what a rise buys, where in a text it is, and which heads keep how much."""

from collections.abc import Mapping, Sequence
from io import StringIO

import torch
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from sale_flex.eval.paired import SEGMENT
from sale_flex.eval.record import Row
from sale_flex.eval.run import Outcome


def trade(found: Sequence[Outcome]) -> str:
    """Rise in loss against density, and against the time of a prefill: a line per rule, through its thresholds."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    by_density, by_time = figure.subplots(1, 2, sharey=True)
    families: dict[tuple[str, int], list[Outcome]] = {}
    for one in found:
        if one.density is not None:
            families.setdefault((one.rule.partition(":")[0], one.tokens), []).append(one)
    for (rule, tokens), members in families.items():
        members.sort(key=lambda one: one.density or 0.0)
        means = [one.rise.mean for one in members]
        reach = [[one.rise.mean - one.rise.low for one in members], [one.rise.high - one.rise.mean for one in members]]
        for axis, at in ((by_density, [one.density for one in members]), (by_time, [one.seconds for one in members])):
            axis.errorbar(at, means, yerr=reach, marker="o", markersize=4, capsize=2, label=f"{rule}, {tokens} tokens")
    by_density.set(xlabel="density", ylabel="rise in loss over dense, nats", xscale="log")
    by_time.set(xlabel="seconds of a prefill")
    for axis in (by_density, by_time):
        axis.axhline(0.0, color="#252525", linewidth=0.8)
        axis.grid(alpha=0.3)
    if families:
        by_density.legend(fontsize=8)
    return _svg(figure)


def by_position(rows: Mapping[str, Sequence[Row]], dense: Sequence[Row], parts: int = 16) -> str:
    """Rise in loss along a sequence, in so many parts, the mean over sequences of one length.

    Args:
        rows: Rule -> rows, in the order of `dense`.
        dense: Rows of dense attention.
        parts: How many, at most: as many as there are segments.
    """
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    axis = figure.subplots()
    base = torch.tensor([row["segments"] for row in dense]).mean(0)
    for rule, of_rule in rows.items():
        rise = (torch.tensor([row["segments"] for row in of_rule]).mean(0) - base) / SEGMENT
        pieces = rise.tensor_split(min(parts, len(rise)))
        at, middle = 0, []
        for piece in pieces:
            middle.append((at + len(piece) / 2) * SEGMENT)
            at += len(piece)
        axis.plot(middle, [piece.mean().item() for piece in pieces], marker=".", label=rule)
    axis.axhline(0.0, color="#252525", linewidth=0.8)
    axis.set(xlabel="position, tokens", ylabel="rise in loss, nats")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return _svg(figure)


def density_map(rows: Sequence[Row]) -> str | None:
    """Density by layer and head, the mean over sequences; None where no layer chose, or layers differ in heads."""
    maps = [row["density"] for row in rows]
    if not maps or not maps[0] or len({len(layer) for of in maps for layer in of}) != 1:
        return None
    density = torch.tensor(maps).mean(0)
    layers, heads = density.shape
    figure = Figure(figsize=(2.5 + 0.28 * heads, 1.2 + 0.22 * layers), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(density.tolist(), vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest", cmap="viridis")
    axis.set(xlabel="head", ylabel="layer that chose")
    figure.colorbar(image, ax=axis)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    FigureCanvasSVG(figure)
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    # From its element on: an XML declaration has no place inside a page.
    return text.getvalue()[text.getvalue().index("<svg") :]
