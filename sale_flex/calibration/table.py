# SPDX-License-Identifier: BSD-3-Clause
"""A calibration as tables of layers and heads, drawn by rich where it is installed, and as JSON."""

import io
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from sale_flex.calibration.artefact import Calibration

Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]
"""Title, header and lines."""


def payload(calibration: Calibration) -> dict[str, Any]:
    """All of a calibration as JSON takes it: ``config.json`` and the tensors as lists."""
    stored = calibration.to_dict() | {"thresholds": calibration.thresholds.tolist()}
    for name, on in (("on", calibration.on), ("transfer", calibration.transfer)):
        if on is not None:
            stored[name] |= {"errors": on.errors.tolist(), "densities": on.densities.tolist()}
    return stored


def render(calibration: Calibration) -> str:
    """The tables, and the summary under them."""
    return "\n".join([*(_draw(*table) for table in _tables(calibration)), str(calibration)])


def _tables(calibration: Calibration) -> Iterator[Table]:
    """Thresholds, densities and errors by layer and head; texts of another kind by layer."""
    layers, on, transfer = calibration.layers, calibration.on, calibration.transfer
    error = f"{calibration.goal.error} error"
    heads = [f"head {head}" for head in range(calibration.thresholds.shape[1])]

    def threshold(x: float) -> str:
        return f"{x:.2g}" if x > 0 else "dense"

    yield (
        "thresholds",
        ["layer", *heads, "smallest", "largest"],
        [
            [str(layer), *map(threshold, [*row.tolist(), row.min().item(), row.max().item()])]
            for layer, row in zip(layers, calibration.thresholds)
        ],
    )
    for title, tensor, form in (("densities", on.densities, ".2f"), (f"{error}s", on.errors, ".3f")):
        lines = [[str(layer), *_forms(row, form), *_forms(_spread(row), form)] for layer, row in zip(layers, tensor)]
        yield title, ["layer", *heads, "mean", "largest"], lines
    if transfer is not None:
        header = ["layer", f"mean {error}: here", "there", "largest: here", "there", "density: here", "there"]
        lines = []
        for n, layer in enumerate((*layers, "all")):
            row = slice(n, n + 1) if n < len(layers) else slice(None)
            (mean, most), (mean_there, most_there) = (_spread(each.errors[row]) for each in (on, transfer))
            densities = (each.densities[row].mean() for each in (on, transfer))
            lines.append([str(layer), *_forms([mean, mean_there, most, most_there, *densities], ".3f")])
        yield "on texts of another kind (there) beside those of the calibration (here)", header, lines


def _spread(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(), x.max()


def _forms(numbers: Tensor | Sequence[Tensor], form: str) -> list[str]:
    return [format(float(number), form) for number in numbers]


def _draw(title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(header, *lines)]
        cells = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in (header, *lines)]
        return "\n".join([title, *cells]) + "\n"
    table = Table(title=title, title_justify="left")
    for name in header:
        table.add_column(name, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    out = io.StringIO()
    # As wide as the heads are many: what shows it may wrap or scroll, but must not lose columns.
    Console(file=out, width=40 * len(header)).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
