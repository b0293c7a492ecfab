# SPDX-License-Identifier: BSD-3-Clause
"""What a calibration has found so far, in a file that an interrupted one goes on with."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sale_flex.calibration.files import read_json, write_json

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
            ValueError: The file holds findings for other settings, or is there without `resume`.
            OSError: The folder can not be made or written.
        """
        self._path, self._settings = None if folder is None else folder / name, dict(settings)
        self.found: list[Layers] = [{} for _ in range(texts)]
        self.measured: list[Layers] = [{} for _ in range(texts)]
        self.losses: list[list[Any]] = [[] for _ in range(texts)]
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            if not resume:
                raise ValueError(
                    f"{self._path.parent} holds an interrupted calibration: go on with it by resume=True (--resume), "
                    f"or remove {name}."
                )
            stored = read_json(self._path, "interrupted calibration")
            check_same(stored.get("settings", {}), self._settings, self._path.parent)
            self.found, self.measured, self.losses = (stored[name] for name in ("found", "measured", "losses"))
        self.save()

    def save(self) -> None:
        """Write the file."""
        if self._path is not None:
            names = ("found", "measured", "losses")
            write_json(self._path, {"settings": self._settings} | {name: getattr(self, name) for name in names})

    def remove(self) -> None:
        """Remove the file: the calibration is done."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


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
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{within}{name}.")
        elif isinstance(old, list) and isinstance(new, list) and name in ("texts", "transfer"):
            if len(old) != len(new):
                yield f"{name} are {len(old)} there and {len(new)} here"
            changed = [n for n, (one, other) in enumerate(zip(old, new)) if one != other]
            if changed:
                yield f"{name} {', '.join(map(str, changed))} are others"
        elif old != new:
            yield f"{within}{name} is {old!r} there and {new!r} here"
