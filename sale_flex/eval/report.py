# SPDX-License-Identifier: BSD-3-Clause
"""The report: one page of HTML with its pictures in it, Markdown for pasting, and JSON."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment

from sale_flex.config import SaleConfig
from sale_flex.eval import plot
from sale_flex.eval.paired import SEGMENT
from sale_flex.eval.record import Record
from sale_flex.eval.run import Outcome, rows_of
from sale_flex.eval.sequences import Part
from sale_flex.eval.subject import DENSE
from sale_flex.eval.table import COLUMNS, cells, markdown
from sale_flex.eval.verdict import Verdict, as_json

HTML, MARKDOWN, JSON = "report.html", "report.md", "report.json"

_TEMPLATE = Path(__file__).parent / "report.html.j2"


class Picture(NamedTuple):
    """A picture of the page."""

    title: str
    svg: str


def write(
    folder: Path,
    model: str,
    found: Sequence[Outcome],
    pictures: Sequence[Picture],
    parts: Mapping[int, Sequence[Part]],
    provenance: Mapping[str, Any],
    verdict: Verdict | None,
) -> dict[str, Any]:
    """Write the three files, and return what is in the JSON."""
    about = ", ".join(f"{len(of)} of {tokens} tokens" for tokens, of in parts.items())
    page = Environment(autoescape=True, trim_blocks=True).from_string(_TEMPLATE.read_text(encoding="utf-8"))
    text = page.render(
        title=f"Sparse attention on {model}",
        verdict=verdict,
        about=f"sequences, {about}",
        segment=SEGMENT,
        columns=COLUMNS,
        rows=[cells(one) for one in found],
        pictures=pictures,
        provenance=provenance,
    )
    payload = {
        "command": "eval",
        "model": model,
        "outcomes": [as_json(one) for one in found],
        "verdict": None if verdict is None else verdict.to_dict(),
        "provenance": dict(provenance),
    }
    folder.mkdir(parents=True, exist_ok=True)
    head = "" if verdict is None else f"```\n{verdict.describe()}\n```\n\n"
    (folder / HTML).write_text(text, encoding="utf-8")
    (folder / MARKDOWN).write_text(head + markdown(found, provenance), encoding="utf-8")
    (folder / JSON).write_text(json.dumps(payload, indent=2) + "\n", encoding="utf-8")
    return payload


def pictures_of(
    record: Record, parts: Mapping[int, Sequence[Part]], rules: Mapping[str, SaleConfig], found: Sequence[Outcome]
) -> list[Picture]:
    """What there is to draw of an evaluation."""
    pictures = [Picture("What a rise buys", plot.trade(found))]
    for tokens, of_length in parts.items():
        rows = {label: rows_of(record, label, config, tokens, of_length) for label, config in rules.items()}
        dense = rows_of(record, DENSE, None, tokens, of_length)
        pictures.append(Picture(f"Along a sequence of {tokens} tokens", plot.by_position(rows, dense)))
        for label, of_rule in rows.items():
            drawn = plot.density_map(of_rule)
            if drawn is not None:
                pictures.append(Picture(f"Density by layer and head: {label}, {tokens} tokens", drawn))
    return pictures
