# SPDX-License-Identifier: BSD-3-Clause
"""Time against length: dense attention beside SALE, and what SALE's time is made of."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sale_flex.bench.results import Row
from sale_flex.bench.stages import STAGES, WHOLE

_STAGE_COLORS = dict(zip(STAGES, ("#9ecae1", "#3182bd", "#08519c", "#fd8d3c", "#fdd0a2")))
_DENSE_COLORS = ("#252525", "#737373", "#a6a6a6", "#c7c7c7")


def draw(settings: Sequence[Sequence[Row]]) -> Figure:
    """Two panels for every config and density asked for.

    Above, milliseconds of dense attention and of `sale_attention` against tokens, both logarithmic. Below, the stages
    stacked, as shares of the first dense candidate that ran (of `sale_attention` if none did), beside the others.

    Args:
        settings: The rows of every setting; those that did not run are left out.

    Raises:
        ValueError: None ran.
    """
    groups: dict[tuple[str, float | None], list[Sequence[Row]]] = {}
    settings = [rows for rows in settings if WHOLE in _milliseconds(rows)]
    if not settings:
        raise ValueError("--plot has nothing to draw: no setting ran")
    for rows in settings:
        groups.setdefault((rows[0]["config"], rows[0]["target_density"]), []).append(rows)
    first = settings[0][0]
    figure = Figure(figsize=(1 + 4.2 * len(groups), 7.5), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(groups), squeeze=False, sharey="row")
    for (above, below), ((config, density), members) in zip(axes.T, groups.items()):
        members.sort(key=lambda rows: rows[0]["length"])
        above.set_title(config if density is None else f"{config}, density {density:g}", fontsize=10)
        _draw_times(above, members)
        _draw_shares(below, members)
    figure.suptitle(
        f"{first['heads']} query heads, {first['kv_heads']} KV heads, {first['head_dim']} channels, batch "
        f"{first['batch']}, {first['dtype']}, {first['device']}, torch {first['torch']}",
        fontsize=9,
    )
    return figure


def _milliseconds(rows: Sequence[Row]) -> dict[str, float]:
    """Medians of the candidates that ran."""
    return {row["name"]: row["ms"] for row in rows if row["ms"] is not None}


def _tokens(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def _draw_times(axis: Axes, members: Sequence[Sequence[Row]]) -> None:
    dense = [f"dense {name}" for name in members[0][0]["baselines"]]
    for name, color in zip((*dense, WHOLE), (*_DENSE_COLORS[: len(dense)], "#e6550d")):
        points = [(rows[0]["length"], found[name]) for rows in members if name in (found := _milliseconds(rows))]
        if points:
            axis.plot(*zip(*points), marker="o", markersize=4, color=color, label=name)
    lengths = [rows[0]["length"] for rows in members]
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(lengths, [_tokens(length) for length in lengths])
    axis.set_xlabel("tokens")
    axis.set_ylabel("ms")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _draw_shares(axis: Axes, members: Sequence[Sequence[Row]]) -> None:
    dense = [f"dense {name}" for name in members[0][0]["baselines"]]
    unit = next((name for name in dense if all(name in _milliseconds(rows) for rows in members)), WHOLE)
    at = range(len(members))
    bottom = [0.0] * len(members)
    for stage, color in _STAGE_COLORS.items():
        shares = [(found := _milliseconds(rows)).get(stage, 0.0) / found[unit] for rows in members]
        axis.bar(at, shares, 0.55, bottom, color=color, label=stage)
        bottom = [low + share for low, share in zip(bottom, shares)]
    for name, marker in zip((WHOLE, *dense), "D_x+1"):
        if name != unit:
            points = [(n, found[name] / found[unit]) for n in at if name in (found := _milliseconds(members[n]))]
            if points:
                axis.scatter(*zip(*points), marker=marker, color="#252525", zorder=3, label=name)
    axis.axhline(1.0, linestyle="--", linewidth=1, color="#252525")
    axis.set_xticks(at, [f"{_tokens(rows[0]['length'])}\n{rows[0]['density']:.2f}" for rows in members])
    axis.set_xlabel("tokens, density")
    axis.set_ylabel(f"time, as a share of {unit}")
    axis.legend(fontsize=8)
