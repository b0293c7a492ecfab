# SPDX-License-Identifier: BSD-3-Clause
"""A setting's rows as text: a heading, a table in Markdown, a line to remember."""

from collections.abc import Sequence

from sale_flex.bench.results import Row
from sale_flex.bench.stages import WHOLE


def describe(row: Row) -> str:
    """Which setting a row belongs to, for people."""
    text = f"{row['length']:,} tokens, {row['config']}"
    return text if row["target_density"] is None else f"{text}, density {row['target_density']:g}"


def render(rows: Sequence[Row]) -> str:
    """The rows of one setting."""
    first = rows[0]
    dense = first["baselines"]
    lines = [f"\n{describe(first)}: keeps {_number(first['density'], '.4f')}"]
    lines[0] += f" at threshold {_number(first['threshold'], '.3g')}"
    if first["dropped"]:
        lines[0] += f", {first['dropped']} blocks had no room in the lists"
    header = ["", "ms", *(f"/ {name}" for name in dense), "extra memory / q", "error"]
    lines += [_line(header), _line(["---"] * len(header))]
    for row in rows:
        time = f"not run: {row['not_run']}" if row["not_run"] else _number(row["ms"], ".3f")
        ratios = [_number(row[f"over_{name}"], ".3f") for name in dense]
        lines.append(
            _line([row["name"], time, *ratios, _number(row["extra_over_query"], ".2f"), _number(row["error"], ".1e")])
        )
    (whole,) = (row for row in rows if row["name"] == WHOLE)
    ratios = [f"{1 / whole[f'over_{name}']:.2f} times {name}" for name in dense if whole[f"over_{name}"] is not None]
    if ratios:
        lines.append(f"Speed of {WHOLE}: {', '.join(ratios)}. ")
        lines[-1] += f"Its output is {whole['error_to_dense']:.1e} away from dense attention."
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
