# SPDX-License-Identifier: BSD-3-Clause
"""What a calibration has found so far, in a file that an interrupted one goes on with."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sale_flex._console.stored import (
    Rule,
    anything,
    by_name,
    check,
    each,
    integer,
    nonnegative,
    number,
    optional,
    record,
    shown,
)
from sale_flex.calibration.files import CONFIG, read_object, write_json

RECORD, TRANSFER_RECORD = "progress.json", "progress-transfer.json"

Layers = dict[str, Any]
"""Layer index -> what was found of it."""


class Record:
    """Findings by text and layer, written after each.

    Attributes:
        found: Per text: the thresholds searched, floats ``[Hq]``, None where there was nothing to choose.
        measured: Per text: ``thresholds`` and what they came to, ``errors``, ``kept`` and ``visible``.
        losses: Per text: loss with dense and with sparse attention, and the number of predicted tokens.
    """

    def __init__(self, folder: Path | None, name: str, settings: Mapping[str, Any], texts: int, resume: bool) -> None:
        """Begin anew, or read what is there.

        Args:
            folder: Where the file is kept; None keeps none.
            name: Of the file.
            settings: What the findings hold for.
            texts: How many there are.
            resume: Whether to go on with what is there.

        Raises:
            ValueError: The file holds findings for other settings, or is damaged; the message names what.
            OSError: The folder can not be made or written.
        """
        self._path, self._settings = None if folder is None else folder / name, dict(settings)
        self.found: list[Layers] = [{} for _ in range(texts)]
        self.measured: list[Layers] = [{} for _ in range(texts)]
        self.losses: list[list[Any]] = [[] for _ in range(texts)]
        if self._path is None:
            return
        if self._path.exists() and resume:
            self._read(self._path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self.save()

    def _read(self, path: Path) -> None:
        stored = read_object(path, "interrupted calibration")
        file, remedy = f"{path} is of a damaged calibration", f"mend it, or remove {path.name} and begin anew."
        settings = check(stored, record({"settings": by_name(anything)}), file, remedy)["settings"]
        check_same(settings, self._settings, path.parent)
        findings = _findings(self._settings["layers"], self._settings["heads"], len(self.found))
        stored = check(stored, findings, file, remedy)
        self.found, self.measured, self.losses = (stored[name] for name in ("found", "measured", "losses"))

    def save(self) -> None:
        """Write the file."""
        if self._path is not None:
            names = ("found", "measured", "losses")
            write_json(self._path, {"settings": self._settings} | {name: getattr(self, name) for name in names})

    def remove(self) -> None:
        """Remove the file: the calibration is done."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def check_free(folder: Path, resume: bool) -> None:
    """Raise ValueError if a folder holds a calibration, or another's config.json, that is not to be gone on with."""
    if resume:
        return
    for name in (RECORD, TRANSFER_RECORD):
        if (folder / name).exists():
            raise ValueError(
                f"{folder} holds an interrupted calibration: go on with it by resume=True (--resume), or remove {name}."
            )
    if (folder / CONFIG).exists():
        raise ValueError(
            f"{folder} holds a {CONFIG} already, which would be replaced: take another folder, or go on with a "
            "calibration by resume=True (--resume)."
        )


def _findings(layers: Sequence[int], heads: int, texts: int) -> Rule:
    """What a record holds, of `texts` texts."""
    names = [str(layer) for layer in layers]
    thresholds = each(number("a number, 0 or more and finite", nonnegative), heads)
    blocks = each(integer(0), heads)
    measured = {"thresholds": thresholds, "errors": each(number(), heads), "kept": blocks, "visible": blocks}
    return record(
        {
            "found": each(by_name(optional(thresholds), names), texts),
            "measured": each(by_name(record(measured), names), texts),
            "losses": each(_losses, texts),
        }
    )


def _losses(value: Any, field: str) -> list[Any]:
    """Nothing yet, or the losses of a text and how many tokens they are the mean of."""
    if value == []:
        return []
    *losses, targets = each(anything, 3)(value, field)
    return [*each(number())(losses, field), integer(1)(targets, f"{field}[2]")]


def check_same(theirs: Mapping[str, Any], ours: Mapping[str, Any], folder: Path) -> None:
    """Raise ValueError, which names every difference, where the settings in `folder` are others."""
    differences = list(_differences(theirs, ours))
    if differences:
        raise ValueError(
            f"resume must go on with the settings of {folder}, but {'; '.join(differences)}. Call it as it was begun, "
            "or take another folder."
        )


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], within: str = "") -> Iterator[str]:
    for name in {**theirs, **ours}:
        old, new = theirs.get(name), ours.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping) and name != "weights":
            yield from _differences(old, new, f"{within}{name}.")
        elif name == "weights" and old != new:
            yield "the model's weights are others than those there"
        elif isinstance(old, list) and isinstance(new, list) and name in ("texts", "transfer"):
            if len(old) != len(new):
                yield f"{name} are {len(old)} there and {len(new)} here"
            changed = [n for n, (one, other) in enumerate(zip(old, new)) if one != other]
            if changed:
                yield f"{name} {', '.join(map(str, changed))} are others"
        elif old != new:
            yield f"{within}{name} is {shown(old)} there and {shown(new)} here"
