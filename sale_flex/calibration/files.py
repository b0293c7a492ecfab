# SPDX-License-Identifier: BSD-3-Clause
"""Files that are, at any moment, the old ones or the new ones."""

import json
import os
from pathlib import Path
from typing import Any

from sale_flex._console.stored import read_json

FORMAT = 2
"""Version of a calibration's files; readers refuse others."""

CONFIG, TENSORS = "config.json", "thresholds.safetensors"
"""Their names."""


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one step."""
    draft = path.with_name(f"{path.name}.part")
    try:
        draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def read_object(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is no {what}: it has no {path.name}.")
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); it is of no {what}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}; it is of no {what}.")
    return content
