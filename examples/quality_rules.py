# SPDX-License-Identifier: BSD-3-Clause
"""The half of `measure_quality.py` that runs no model: how rules are written, the file of rows, tables, equal loss."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from sale_flex import Mass, SaleConfig
from sale_flex._console.stored import stored_config

BASES: dict[str, dict[str, Any]] = {
    "moments": {"rule": "mass", "pool_mode": "mean", "sub_block": 8, "bits": 4},
    "scan": {"rule": "mass", "sub_block": 1},
    "relative": {"rule": "relative", "bits": 4},
    "calibrated": {"rule": "relative", "bits": 4},
    "calibrated-absolute": {"rule": "relative", "bits": 4},
}
"""How a rule's name begins -> what it is."""

FIRST_TAU = 0.008
"""Where calibration begins, unless ``start`` says so; the paper's."""

OPTIONS = [x.name for kind in (Mass, SaleConfig) for x in fields(kind) if x.name not in ("rule", "threshold")]
"""What may follow in a rule's name."""

RULES = (
    "relative:0.004:0.008:0.016:0.032,calibrated:0.1:0.2,calibrated/start=0.128:0.05:0.1:0.2,scan:0.01:0.02:0.04,"
    "scan/pool=2:0.02,scan/pool=8:0.02,moments:0.005:0.01:0.02,moments/bits=8:0.005:0.01:0.02"
)
"""What is measured by default."""

NEEDLE_RULES = (
    "relative:0.016,scan:0.01:0.02,scan/pool=1:0.02,moments:0.01:0.005,moments/sub_block=4:0.01:0.005,"
    "moments/bits=8:0.01,moments/pool=2:0.01,moments/pool=1:0.02:0.01,"
    "moments/pool=1/sub_block=4:0.02,moments/pool=1/bits=8:0.02"
)
"""Of which needle rows are counted by default."""

SAME_RUN = ("device", "torch", "commit")
"""Fields of provenance: a row in which one differs is measured again."""

SHOWN = (
    "rule",
    "layer",
    "placement",
    "density",
    "rise",
    "exact recall",
    "share",
    "dense heads",
    "differing",
    "seconds",
)
"""What of a row is shown as soon as it is measured."""

QUALITY_COLUMNS = {"density": ".3f", "loss": ".4f", "rise": "+.4f", "recall": ".3f"}
NEEDLE_COLUMNS = {"density": ".3f", "needles": "g", "share kept": ".4f"}
CHECK_COLUMNS = {"rule": "", "layer": "", "density": ".4f", "visible": "", "differing": "", "ties": "", "path": ""}
"""What the tables show of rows, and how."""

RISES = (0.003, 0.006)
"""Rises in loss at which densities are compared."""
RISE_LIMIT, RECALL_LIMIT, SHARE_LIMIT = 0.006, 0.05, 0.5
"""Largest rise in loss and loss of recall of a mass rule, and its density's largest share of the relative rule's."""


@dataclass(frozen=True)
class Rule:
    """One row of a table: a rule at a threshold."""

    name: str
    """``moments``, ``moments/pool=1``, ..."""
    threshold: float
    """Of the config; of a calibrated rule, the error allowed."""
    config: SaleConfig
    """With the threshold, unless it is calibrated."""
    start: float = FIRST_TAU
    """Of a calibrated rule, the largest threshold."""

    @property
    def label(self) -> str:
        """As it is written on the command line."""
        return f"{self.name}:{self.threshold:g}"

    @property
    def calibrated(self) -> bool:
        """Whether thresholds are calibrated for every head."""
        return self.name.startswith("calibrated")

    @property
    def absolute(self) -> bool:
        """Whether the error allowed is absolute, not a share of the output's size."""
        return self.name.startswith("calibrated-absolute")

    @property
    def fields(self) -> dict[str, Any]:
        """What a row says of it."""
        start = {"start": self.start} if self.calibrated else {}
        of_config = stored_config(self.config)
        options = of_config.pop("rule")
        return {"rule": self.label, **options, **of_config, "threshold": self.threshold, **start}


def parse_rules(text: str, common: SaleConfig) -> list[Rule]:
    """Read a comma-separated list of ``NAME[/OPTION=VALUE...]:THRESHOLD[:THRESHOLD...]``.

    Args:
        text: For instance ``relative:0.016,moments/pool=1/block_size=64x32:0.01:0.02,calibrated:0.1``; ``none``
            and the empty text are no rules.
        common: What a rule does not name.

    Raises:
        ValueError: A name, an option or a threshold is wrong; the message says which.
    """
    rules: dict[str, Rule] = {}
    for item in () if text.strip() in ("", "none") else text.split(","):
        name, *thresholds = item.strip().split(":")
        base, *options = name.split("/")
        if base not in BASES:
            raise ValueError(f"a rule's name must be one of {', '.join(BASES)}, got {base!r} in {item!r}")
        if not thresholds:
            raise ValueError(f"a rule needs a threshold, such as {base}:0.01, got {item!r}")
        calibrated = base.startswith("calibrated")
        known = [*OPTIONS, "start"] if calibrated else OPTIONS
        given: dict[str, Any] = {}
        for option in options:
            field, _, value = option.partition("=")
            if field not in known:
                raise ValueError(f"a rule's option must be one of {', '.join(known)}, got {option!r} in {item!r}")
            given[field] = _parse_value(field, value, item)
        start = given.pop("start", FIRST_TAU)
        try:
            chosen = BASES[base] | given
            config = SaleConfig.from_options(**(_common_options(common) | chosen))
            for threshold in map(float, thresholds):
                with_it = config.with_options(threshold=threshold)  # of a calibrated rule this checks the range alone
                rule = Rule(name, threshold, config if calibrated else with_it, start)
                rules[rule.label] = rule
        except ValueError as error:
            raise ValueError(f"{item!r}: {error}") from None
    return list(rules.values())


def _common_options(common: SaleConfig) -> dict[str, Any]:
    return {field.name: getattr(common, field.name) for field in fields(common) if field.name != "rule"}


def _parse_value(field: str, value: str, item: str) -> Any:
    try:
        if field == "block_size":
            return tuple(map(int, value.split("x")))
        if field == "pool_mode":
            return value
        return float(value) if field == "start" else int(value)
    except ValueError:
        form = {"block_size": "NxN", "start": "a threshold"}.get(field, "N")
        raise ValueError(f"{field} must be {form}, got {item!r}") from None


class Rows:
    """The rows measured so far, and the file they are in."""

    def __init__(self, path: Path | None, fresh: bool, common: Mapping[str, Any]) -> None:
        """Read the file, if there is one and `fresh` is not asked for; `common` is in every new row."""
        self._path, self._common = path, dict(common)
        self.rows: list[dict[str, Any]] = []
        if path is not None and path.exists() and not fresh:
            self.rows = json.loads(path.read_text(encoding="utf-8"))

    def once(self, identity: Mapping[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row that has these fields: the one there is, or one measured now."""
        identity = json.loads(json.dumps(identity))  # as it looks when it is read again
        found = [row for row in self.rows if all(row.get(name) == value for name, value in identity.items())]
        for row in found:
            if all(row.get(name) == self._common.get(name) for name in SAME_RUN):
                return row
        began = time.perf_counter()
        row = {**identity, **measure()}
        row |= {"seconds": round(time.perf_counter() - began, 2)} | self._common
        self.rows = [old for old in self.rows if not any(old is each for each in found)] + [row]
        self.save()
        shown = (f"{name} {_short(row[name])}" for name in SHOWN if name in row)
        print(f"{row['kind']}: {', '.join(shown)}", file=sys.stderr, flush=True)
        return row

    def replace_kind(self, kind: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Put rows that are computed from others in the place of all of their kind."""
        self.rows = [row for row in self.rows if row.get("kind") != kind]
        self.rows += [{"kind": kind, **row, **self._common} for row in rows]
        self.save()

    def save(self) -> None:
        """Write the file, so that an interruption leaves the old one or the new one."""
        if self._path is not None:
            part = self._path.with_name(f"{self._path.name}.part")
            part.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")
            part.replace(self._path)


def _short(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def placement_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A line per rule: the sequences of every placement taken together and, if there are several, all of them."""
    placements = list(dict.fromkeys(row["placement"] for row in rows))
    places = f" ({' / '.join([*placements, 'all'])})" if len(placements) > 1 else ""
    lines = []
    for label in dict.fromkeys(row["rule"] for row in rows):
        of = [row for row in rows if row["rule"] == label]
        parts = [[row for row in of if row["placement"] == placement] for placement in placements]
        parts += [of] if len(parts) > 1 else []
        cells = (" / ".join(format(_together(part, name), form) for part in parts) for name, form in columns.items())
        lines.append([label, *cells])
    return table(["rule", *(name + places for name in columns)], lines)


def _together(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """One number for several rows: a mean over sequences, but needles are counted."""
    if name == "needles":
        return sum(row[name] for row in rows)
    if name == "share kept":
        return sum(row["needles kept"] for row in rows) / max(sum(row["needles"] for row in rows), 1)
    return fmean(row[name] for row in rows)


class Point(NamedTuple):
    """What a rule at a threshold came to, of one sequence or in the mean of several."""

    label: str
    density: float
    rise: float
    """In loss, over dense."""
    recall: float
    """Exact recall, less dense attention's."""


class Needed(NamedTuple):
    """The density that a rule needs for a rise in loss: between two numbers, equal ones if it was measured."""

    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.low:.3f}"
        return f"> {self.low:.3f}" if self.low > 0 else f"< {self.high:.3f}"


def density_needed(points: Sequence[Point], rise: float) -> Needed:
    """The density below which the loss rises by more than `rise`; between points linear in the density's logarithm.

    Where rises are noisy it is the greatest such density: all points above it rise by no more. Nothing is extrapolated:
    where every point rises by no more, less than the least density is needed, and more than the greatest if it does.
    """
    points = sorted(points, key=lambda point: -point.density)
    for before, point in zip([None, *points], points):
        if point.rise > rise:
            if before is None:
                return Needed(point.density, 1.0)
            part = (rise - before.rise) / (point.rise - before.rise)
            logs = math.log(before.density), math.log(point.density)
            density = math.exp(logs[0] + part * (logs[1] - logs[0]))
            return Needed(density, density)
    return Needed(0.0, points[-1].density)


def ratio(of: Needed, to: Needed) -> str:
    """`of` divided by `to`, as far as it is known."""
    if of.low == of.high and to.low == to.high:
        return f"{of.low / to.low:.2f}"
    if of.low > 0 and (of.low < of.high or to.low == 0):  # `of` may be greater, or `to` less
        return "?" if 0 < to.low < to.high else f"> {of.low / to.high:.2f}"
    return f"< {of.high / to.low:.2f}" if to.low > 0 else "?"


Columns = dict[str, dict[str, list[Point]]]
"""Name of a sequence, or ``mean`` -> name of a rule -> its points."""


def collect_points(rows: Sequence[Mapping[str, Any]], rules: Sequence[Rule]) -> Columns:
    """Points from rows of quality: of the mean over sequences, and of each."""
    samples = {f"{row['sample'] + 1} {row['placement']}": row["sample"] for row in rows}
    wanted = {"mean": set(samples.values())} if len(samples) > 1 else {}
    columns: Columns = {}
    for column, which in (wanted | {name: {number} for name, number in samples.items()}).items():
        columns[column] = {}
        for rule in rules:
            of = [row for row in rows if row["sample"] in which and row["rule"] == rule.label]
            numbers = (fmean(row[name] for row in of) for name in ("density", "rise", "recall over dense"))
            columns[column].setdefault(rule.name, []).append(Point(rule.label, *numbers))
    return columns


def equal_loss(columns: Columns) -> Iterator[dict[str, Any]]:
    """A row for every rise and rule: the density needed, and its share of what the relative rule needs."""
    for rise in RISES:
        for name in next(iter(columns.values())):
            row: dict[str, Any] = {"rise": rise, "rule": name, "needed": {}}
            for column, rules in columns.items():
                needed = density_needed(rules[name], rise)
                row["needed"][column] = needed
                share = f" ({ratio(needed, density_needed(rules['relative'], rise))})" if "relative" in rules else ""
                row[column] = f"{needed}{share}"
            yield row


def half_density(columns: Columns, rules: Sequence[Rule]) -> Iterator[dict[str, Any]]:
    """A row for every mass rule and threshold: whether it keeps quality at half of the relative rule's density.

    A point is compared with what the relative rule needs for a rise of all of `RISE_LIMIT`, however little it rises.
    """
    for rule in rules:
        if rule.config.rule.name == "mass":
            row = {"rule": rule.label}
            for column, points in columns.items():
                (point,) = (point for point in points[rule.name] if point.label == rule.label)
                row[column] = verdict(point, density_needed(points["relative"], RISE_LIMIT))
            yield row


def verdict(point: Point, relative: Needed) -> str:
    """Whether a point keeps quality at half of the density that the relative rule needs, and why not."""
    if point.rise > RISE_LIMIT:
        return f"no: rise {point.rise:+.4f}"
    if point.recall < -RECALL_LIMIT - 1e-9:  # a share of whole recalls, rounded
        return f"no: recall {point.recall:+.3f}"
    share = ratio(Needed(point.density, point.density), relative)
    if point.density <= SHARE_LIMIT * relative.low:
        return f"yes: {share}"
    if point.density > SHARE_LIMIT * relative.high:
        return f"no: {share}"
    return f"open: {share}"  # the relative rule was measured at no threshold that tells
