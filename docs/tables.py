# SPDX-License-Identifier: BSD-3-Clause
"""Writes docs/results/*.md from the JSON beside them: no figure of theirs is typed.

python docs/tables.py
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"

NAMES = {
    "scan": "default",
    "moments": "fast",
    "relative": "SALE as published",
    "exact": "exact masses of every 4th query",
}
"""A rule's name on the command line -> in a page."""

SHOWN = ("scan:0.01", "moments:0.005", "relative:0.004", "exact:0.01")
"""Rules whose texts and heads are shown one by one."""


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table of Markdown."""
    lines = [list(head), *([str(cell) for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def named(rule: str) -> str:
    """A rule and its threshold, in words."""
    name, _, threshold = rule.partition(":")
    return f"{NAMES[name]}, {threshold}"


def provenance(measured: dict[str, Any]) -> str:
    """Where figures are from."""
    versions = ", ".join(f"{name} {measured[name]}" for name in ("torch", "triton", "transformers") if name in measured)
    return f"One {measured['device']}, {versions}, commit {measured['commit']}. {measured['what']}"


def worst(squares: list[list[float]], wanted: list[list[float]]) -> float:
    """The miss of the worst head."""
    return max(s / (w + 1) for layer in zip(squares, wanted) for s, w in zip(*layer))


def trust_rules() -> str:
    """Losses of rules, and what the audit reads of every head."""
    made = json.loads((RESULTS / "trust_rules.json").read_text(encoding="utf-8"))
    times = json.loads((RESULTS / "trust_times.json").read_text(encoding="utf-8"))
    rows, audits = made["rows"], made["audits"]
    parts = [
        "# What rules cost models, and what the audit reads",
        provenance(made["measured"]) + ".",
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
        provenance(times["measured"]) + ".",
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


def _mask_times(calls: list[dict[str, Any]]) -> str:
    lines = []
    for call in calls:
        for name, density in call["density"].items():
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


PAGES: dict[str, Callable[[], str]] = {"trust_rules.md": trust_rules}
"""Page -> what writes it."""


if __name__ == "__main__":
    for page, write in PAGES.items():
        (RESULTS / page).write_text(write(), encoding="utf-8")
