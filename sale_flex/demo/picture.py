# SPDX-License-Identifier: BSD-3-Clause
"""A picture of the blocks that every head kept."""

from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from sale_flex.demo.run import Report

_COLORS = ListedColormap(["#f2f2f2", "#dce6f2", "#1f4e8c"])  # unseen, dropped, kept


def draw(maps: Sequence[Tensor], report: Report) -> Figure:
    """One small map per layer (row) and head (column): queries downwards, keys to the right.

    Args:
        maps: Kept blocks of every layer, bool `[Hq, nq, nk]`.
        report: Densities and the title.
    """
    layers, heads = len(maps), len(maps[0])
    figure = Figure(figsize=(1 + 1.9 * heads, 1 + 2.1 * layers), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.subplots(layers, heads, squeeze=False)
    for layer, kept in enumerate(maps):
        seen = kept.new_ones(kept.shape[1:]).tril()
        for head in range(heads):
            axis = axes[layer, head]
            axis.imshow(
                (seen.int() + kept[head].int()).numpy(),
                cmap=_COLORS,
                vmin=0,
                vmax=2,
                interpolation="nearest",
            )
            axis.set_title(f"{report.head_density[layer][head]:.2f}", fontsize=8)
            axis.set_xticks([])
            axis.set_yticks([])
            if head == 0:
                axis.set_ylabel(f"layer {layer}", fontsize=8)
            if layer == layers - 1:
                axis.set_xlabel(f"head {head}", fontsize=8)
    query_block, key_block = report.config["block_size"]
    figure.suptitle(
        f"Blocks of {query_block} queries x {key_block} keys that SALE kept of a prompt of "
        f"{report.tokens} tokens\n"
        f"(dark; above each map: kept / visible, in all {report.density:.2f})",
        fontsize=9,
    )
    return figure
