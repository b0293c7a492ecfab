# SPDX-License-Identifier: BSD-3-Clause
"""Writes every table of figures from the JSON in docs/results: no figure of a table is typed.

    python docs/tables.py            # writes the pages anew
    python docs/tables.py --check    # names those that differ from their JSON, and fails

A table stands in a page between two comments, with a line of what was measured where:

    <!-- table: results/speed.json -->
    <!-- end -->

To add one, write the comments and the JSON, and run the first command. The JSON holds

* `measured`: `what` was measured, on which `input`, in which `dtype`, and by what: `device`, `torch`, `triton`,
  `transformers`, `commit`, `command`; null where nobody wrote it down,
* `rows`: a dict each, of figures and text by name,
* `columns`: heading -> how a cell is written from its row, as in `"rise": "{rise_end:+} / {rise_scattered:+}"`. Figures
  have the digits of the JSON, 1.70 for 1.70, unless the format says otherwise. A null among them empties the cell,
* `transpose`: true where a row is a column of the page.

A row may have two more: `says`, heading -> a cell in words, and `bold`, headings of bold cells. A table that takes
more, such as means over a campaign's texts, has a function here, and its name in the comment: `<!-- table: costs -->`.
"""

import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Container, Iterable
from decimal import Decimal
from pathlib import Path
from statistics import fmean
from string import Formatter
from textwrap import fill
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT, RESULTS = DOCS.parent, DOCS / "results"

NAMES = {
    "scan": "default",
    "moments": "fast",
    "relative": "SALE as published",
    "exact": "exact masses of every 4th query",
    "every 2th query, exact": "every 2nd query, exact",
    "mean of 4, moments of 8 in 4 bits": "fast: mean of 4, moments of 8 in 4 bits",
}
"""A rule's name on the command line or in trust.json -> in a page, where it has another."""

SHOWN = ("scan:0.01", "moments:0.005", "relative:0.004", "exact:0.01")
"""Rules whose texts and heads are shown one by one."""

DEFAULT = "scan:0.01"

OF_DEFAULT = (
    "exact:0.01",
    DEFAULT,
    "scan:0.02",
    "scan:0.04",
    "moments:0.005",
    "moments:0.01",
    "relative:0.004",
    "relative:0.016",
)
"""Rules beside the default in docs/measured.md."""

TEXTS = 6
"""How many each model has read in trust.json and trust_rules.json."""

HARM = 0.02
"""Cells with a mean rise above it are bold."""

MODELS = (
    ("house-lm", 32768),
    ("SmolLM2-135M-Instruct", 8192),
    ("Gemma 3 270M", 32768),
    ("Gemma 3 270M", 8192),
)

ESTIMATES = (
    "every query, exact:0.02",
    "every 2th query, exact:0.02",
    "every 4th query, exact:0.02",
    "every 8th query, exact:0.02",
    "every 16th query, exact:0.02",
    "every 4th query, keys in 8 bits, products shifted by 8:0.02",
    "scan:0.02",
    DEFAULT,
    "every 4th query, keys in 4 bits:0.02",
    "every 4th query, keys in 4 bits, rotated:0.02",
    "every 4th query, moments of 8, float:0.02",
    "every 8th query, keys in 8 bits, rotated:0.01",
    "mean of 4, exact:0.005",
    "mean of 4, keys in 4 bits:0.005",
    "mean of 4, keys in 4 bits, rotated:0.005",
    "mean of 4, keys in 8 bits, products shifted by 8:0.005",
    "mean of 4, keys in 8 bits, rotated:0.005",
    "mean of 4, moments of 8, float:0.005",
    "mean of 4, moments of 8 in 8 bits, products shifted by 8:0.005",
    "mean of 4, moments of 8 in 8 bits:0.005",
    "mean of 4, moments of 8 in 4 bits:0.005",
    "mean of 4, moments of 8 in 4 bits, not smoothed:0.005",
)
"""Ways to know a block's mass that docs/decisions.md compares; the two of the default are of trust_rules.json."""


def read(name: str, number: Callable[[str], Any] = float) -> Any:
    """A JSON of figures; as Decimals they keep the digits that they have there."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"), parse_float=number)


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table of Markdown."""
    lines = [list(head), *([str(cell) for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def named(rule: str) -> str:
    """A rule and its threshold, in words."""
    name, _, threshold = rule.partition(":")
    return f"{NAMES.get(name, name)}, {threshold}"


def provenance(measured: dict[str, Any]) -> str:
    """Where figures are from."""
    names = [name for name in ("torch", "triton", "transformers") if measured.get(name)]
    device = f"One {measured['device']}" if measured["device"] else "Device not recorded"
    commit = f"commit {measured['commit']}" if measured["commit"] else "commit not recorded"
    return ", ".join([device, *(f"{name} {measured[name]}" for name in names), commit])


def worst(squares: list[list[float]], wanted: list[list[float]]) -> float:
    """The miss of the worst head."""
    return max(s / (w + 1) for layer in zip(squares, wanted) for s, w in zip(*layer))


def trust_rules() -> str:
    """Losses of rules, and what the audit reads of every head."""
    made, times = read("trust_rules.json"), read("trust_times.json")
    rows, audits = made["rows"], made["audits"]
    parts = [
        "# What rules cost models, and what the audit reads",
        f"{provenance(made['measured'])}. {made['measured']['what']}.",
        made["measured"]["rises"] + ".",
    ]
    for model, tokens in dict.fromkeys((row["model"], row["tokens"]) for row in rows):
        here = [row for row in rows if (row["model"], row["tokens"]) == (model, tokens)]
        of_heads = {one["rule"]: one for one in audits if (one["model"], one["tokens"]) == (model, tokens)}
        parts.append(f"## {model}, {tokens:,} tokens")
        lines = []
        for rule, audit in of_heads.items():
            found = [row for row in here if row["rule"] == rule]
            rises = [row["rise"] for row in found]
            density, miss = fmean(row["density"] for row in found), worst(audit["squares"], audit["wanted"])
            lines.append((named(rule), f"{fmean(rises):+.4f}", f"{max(rises):+.4f}", f"{density:.3f}", f"{miss:.2f}"))
        parts.append(table(("rule", "mean rise", "largest rise", "density", "miss, worst head"), lines))
        texts = list(dict.fromkeys(row["sequence"] for row in here))
        by_text = {(row["rule"], row["sequence"]): row for row in here}
        cells = [[named(rule), *(_cell(by_text[rule, text]) for text in texts)] for rule in SHOWN]
        parts += ["Rise and density of every text:", table(("rule", *texts), cells)]
        parts += ["Miss of every head, summed over the texts; a line per layer that chooses:"]
        parts.append(table(("layer", *map(named, SHOWN[:2])), _heads([of_heads[rule] for rule in SHOWN[:2]])))
    parts += [
        "## What it costs",
        f"{provenance(times['measured'])}. {times['measured']['what']}.",
        _mask_times(times["calls"]),
        _audit_times(times["audit"]),
    ]
    return "\n\n".join(parts) + "\n"


def _cell(row: dict[str, Any]) -> str:
    return f"{row['rise']:+.4f}, {row['density']:.3f}"


def _heads(audits: list[dict[str, Any]]) -> Iterable[tuple[object, ...]]:
    for layer in range(len(audits[0]["wanted"])):
        pairs = [zip(one["squares"][layer], one["wanted"][layer]) for one in audits]
        yield (layer, *(" ".join(f"{s / (w + 1):.2f}".lstrip("0") for s, w in pair) for pair in pairs))


def _mask_times(calls: list[dict[str, Any]], shown: Container[tuple[str, int, str]] | None = None) -> str:
    lines = []
    for call in calls:
        for name, density in call["density"].items():
            if shown is not None and (call["kind"], call["tokens"], name) not in shown:
                continue
            block_mask, whole = call["ms"][f"mask {name}"], call["ms"][f"call {name}"]
            times = (f"{block_mask:.1f} ms", f"{whole:.1f} ms", f"{call['ms']['cudnn']:.1f} ms")
            lines.append((f"{name}, {call['kind']}, {call['tokens'] // 1024}K", f"{density:.3f}", *times))
    return table(("rule and threshold, tensors, tokens", "density", "block mask", "whole call", "cuDNN"), lines)


def _audit_times(audits: list[dict[str, Any]]) -> str:
    lines = []
    for one in audits:
        heads = f"{one['heads']} / {one['kv_heads']} x {one['head_dim']}"
        times = (f"{one['audit']:.3f} ms", f"{one['dense']:.2f} ms", f"{one['audit'] / one['dense']:.1%}")
        lines.append((f"{one['tokens'] // 1024}K", heads, *times))
    return table(("tokens", "heads", "audit", "dense attention", "share"), lines)


def costs() -> str:
    """Times of the default and of the fast estimate."""
    made = read("trust_times.json")
    learned, synthetic = "house-lm layers 1 to 4", "generator"
    rules = ("default, 0.01", "default, 0.02", "fast, 0.005")
    shown = {(learned, tokens, rule) for tokens in (32768, 131072) for rule in rules}
    shown |= {(synthetic, 131072, rule) for rule in rules[::2]} | {(synthetic, 32768, rules[0])}
    return f"{provenance(made['measured'])}.\n\n{_mask_times(made['calls'], shown)}"


def losses(rules: Iterable[str], models: Iterable[tuple[str, int]], cell: str, *files: str) -> str:
    """Rises in loss: a line for each rule, a column for each model.

    Args:
        rules: Rules and their thresholds, as the files name them.
        models: Names and tokens.
        cell: How a mean `rise`, the `largest` of a text and `density` are written; `few` is a star where not every
            text was read.
        files: Where the figures are from.
    """
    # By text, because trust.json has a few runs twice.
    runs: dict[tuple[str, str, int], dict[str, Any]] = defaultdict(dict)
    sources = []
    for made in map(read, files):
        sources.append(f"{provenance(made['measured'])}.")
        for row in made["rows"]:
            rule = f"{row['rule']}:{row['threshold']}" if "threshold" in row else row["rule"]
            runs[rule, row["model"], row["tokens"]][row["sequence"]] = row
    head, lines = ["rule", *(f"{name}, {tokens // 1024}K" for name, tokens in models)], []
    for rule in rules:
        label = f"**{named(rule)}**" if rule == DEFAULT else named(rule)
        lines.append([label, *(_loss(list(runs[(rule, *model)].values()), cell) for model in models)])
    return "\n".join([*sources, "", table(head, lines)])


def _loss(texts: list[dict[str, Any]], cell: str) -> str:
    if not texts:
        return ""
    rises = [text["rise"] for text in texts]
    rise, density = fmean(rises), fmean(text["density"] for text in texts)
    text = cell.format(rise=rise, largest=max(rises), density=density, few="" if len(texts) == TEXTS else r"\*")
    text = re.sub(r"\b0\.", ".", text)  # +0.0012 is +.0012
    return f"**{text}**" if rise > HARM else text


def as_it_says(made: dict[str, Any]) -> str:
    """A table that says itself how it is written, below what was measured."""
    measured = made["measured"]
    command = f": `{measured['command']}`" if measured["command"] else ""
    dtype = f", {measured['dtype']}" if measured["dtype"] else ""
    said = f"{measured['what']}; {measured['input']}{dtype}. {provenance(measured)}{command}."
    columns = made["columns"]
    lines = [list(columns), *([_cell_of(row, *column) for column in columns.items()] for row in made["rows"])]
    head, *lines = [list(line) for line in zip(*lines)] if made.get("transpose") else lines
    return f"{fill(said, 120, break_long_words=False, break_on_hyphens=False)}\n\n{table(head, lines)}"


def _cell_of(row: dict[str, Any], heading: str, form: str) -> str:
    names = [name for _, name, _, _ in Formatter().parse(form) if name]
    cell = "" if any(row[name] is None for name in names) else form.format_map(row)
    cell = row.get("says", {}).get(heading, cell)
    return f"**{cell}**" if heading in row.get("bold", ()) else cell


TABLES: dict[str, Callable[[], str]] = {
    "costs": costs,
    "default": lambda: losses(OF_DEFAULT, MODELS, "{rise:+.4f}, {largest:+.4f}, {density:.3f}", "trust_rules.json"),
    "estimates": lambda: losses(
        ESTIMATES, MODELS[:3], "{rise:+.4f}{few}, {density:.3f}", "trust.json", "trust_rules.json"
    ),
    "readme": lambda: losses(SHOWN[:3], MODELS[:3], "{rise:+.4f} ({largest:+.4f}), {density:.2f}", "trust_rules.json"),
}
"""What a comment calls a table whose JSON does not say how it is written -> what writes it."""

WHOLE: dict[Path, Callable[[], str]] = {RESULTS / "trust_rules.md": trust_rules}
"""Pages without a word that is typed -> what writes them."""

PAGES = (ROOT / "README.md", *sorted(DOCS.glob("*.md")), *WHOLE)

BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def written(page: Path, text: str) -> str:
    """What a page is when its tables are what their JSON says."""
    if page in WHOLE:
        return WHOLE[page]()
    return BLOCK.sub(lambda found: f"{found[1]}\n{_table_called(found[2])}\n\n{found[3]}", text)


def _table_called(name: str) -> str:
    return TABLES[name]() if name in TABLES else as_it_says(read(name.removeprefix("results/"), Decimal))


def main(check: bool) -> int:
    """Write the pages, or say which differ from what would be written."""
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (new := written(page, text)) != text:
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(new, encoding="utf-8")
    print("".join(f"{name}\n" for name in stale), end="")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
