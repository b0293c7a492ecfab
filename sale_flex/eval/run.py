# SPDX-License-Identifier: BSD-3-Clause
"""The loss of a model on text under rules, row by row, and what rules came to over sequences."""

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean, median
from typing import Any, NamedTuple

from sale_flex._console.progress import Lines
from sale_flex._console.stored import stored_config
from sale_flex.config import SaleConfig
from sale_flex.eval.paired import Rise, rise_of, segment_sums
from sale_flex.eval.record import Record, Row
from sale_flex.eval.sequences import Part
from sale_flex.eval.subject import DENSE, Subject


class Outcome(NamedTuple):
    """What a rule came to on the sequences of a length."""

    rule: str
    tokens: int
    rise: Rise
    """Over dense."""
    largest: float
    """Rise of the sequence where it is largest."""
    density: float | None
    """Kept over visible blocks, the mean over layers that chose, heads and sequences; None where no layer chose."""
    miss: float | None
    """Of the head that missed most, as the audit has it."""
    seconds: float
    """Of a prefill: the median, without the first one, which may have compiled."""
    speedup: float
    """Dense attention's seconds, of the same sequences, divided by these."""


def measure(
    subject: Subject, record: Record, parts: Mapping[int, Sequence[Part]], rules: Mapping[str, SaleConfig], meter: Lines
) -> None:
    """Measure what is missing: every sequence dense, and then under every rule.

    Args:
        subject: The model.
        record: Where rows go.
        parts: Tokens -> sequences.
        rules: Label -> config.
        meter: Who is told.
    """
    for tokens, of_length in parts.items():
        for part in of_length:
            for label, config in ((DENSE, None), *rules.items()):
                identity = _identity(label, config, tokens, part)
                if record.find(identity) is None:
                    meter.begin(f"{tokens} tokens, {part.name}, {label}")
                    record.once(identity, partial(_measure, subject, part, config))
                    meter.finish("")


def missing(record: Record, parts: Mapping[int, Sequence[Part]], rules: Mapping[str, SaleConfig]) -> int:
    """How many rows `measure` would measure."""
    wanted = [
        _identity(label, config, tokens, part)
        for tokens, of_length in parts.items()
        for part in of_length
        for label, config in ((DENSE, None), *rules.items())
    ]
    return sum(record.find(identity) is None for identity in wanted)


def outcomes(record: Record, parts: Mapping[int, Sequence[Part]], rules: Mapping[str, SaleConfig]) -> list[Outcome]:
    """What every rule came to, length by length; all rows have to be there."""
    found = []
    for tokens, of_length in parts.items():
        dense = rows_of(record, DENSE, None, tokens, of_length)
        for label, config in rules.items():
            found.append(_outcome(label, tokens, rows_of(record, label, config, tokens, of_length), dense))
    return found


def rows_of(record: Record, label: str, config: SaleConfig | None, tokens: int, parts: Sequence[Part]) -> list[Row]:
    """The rows of a rule on the sequences of a length, which `measure` has measured."""
    found = [record.find(_identity(label, config, tokens, part)) for part in parts]
    return [row for row in found if row is not None]


def _identity(label: str, config: SaleConfig | None, tokens: int, part: Part) -> dict[str, Any]:
    stored = None if config is None else stored_config(config, threshold=True)
    return {"kind": "loss", "rule": label, "config": stored, "tokens": tokens, "sha256": part.sha256}


def _measure(subject: Subject, part: Part, config: SaleConfig | None) -> dict[str, Any]:
    found = subject.measure(part.text, config)
    return {
        "sequence": part.name,
        "loss": found.losses.double().mean().item(),
        "targets": len(found.losses),
        "segments": segment_sums(found.losses),
        "density": found.density,
        "miss": found.miss,
        "paths": found.paths,
        "seconds": found.seconds,
    }


def _outcome(label: str, tokens: int, rows: Sequence[Row], dense: Sequence[Row]) -> Outcome:
    segments, base = ([row["segments"] for row in of] for of in (rows, dense))
    rise = rise_of(segments, base, [row["targets"] for row in rows])
    heads = [head for row in rows for layer in row["density"] for head in layer]
    misses = [row["miss"] for row in rows if row["miss"] is not None]
    seconds, of_dense = (median(row["seconds"] for row in of[1:] or of) for of in (rows, dense))
    return Outcome(
        label,
        tokens,
        rise,
        max(row["loss"] - base["loss"] for row, base in zip(rows, dense)),
        fmean(heads) if heads else None,
        max(misses, default=None),
        seconds,
        of_dense / seconds,
    )
