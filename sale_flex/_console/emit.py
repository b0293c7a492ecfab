# SPDX-License-Identifier: BSD-3-Clause
"""A subcommand's result, for people or as JSON."""

import json
from pathlib import Path
from typing import Any


def emit(payload: dict[str, Any], text: str, destination: str | None) -> None:
    """Give a subcommand's result: the text, unless JSON takes its place.

    Args:
        payload: What goes into JSON.
        text: The same for people.
        destination: The value of ``--json``: None, ``-`` for JSON on standard output instead of the text, or a file to
            write beside printing the text.
    """
    if destination == "-":
        print(json.dumps(payload, indent=2))
        return
    if destination is not None:
        Path(destination).write_text(json.dumps(payload, indent=2) + "\n", encoding="utf-8")
    print(text)
