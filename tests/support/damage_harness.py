# SPDX-License-Identifier: BSD-3-Clause
"""Files as people damage them: a field dropped, of another type, empty, huge, nested, or no number at all."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

DROP = object()
"""Stands for a field that is gone."""

VALUES = (
    DROP, None, True, False, 0, 1, -1, 3, 2**63, 10**400, -0.5, 0.5, 1e400, math.nan, "", "x", "0", "\ud800", "é" * 500,
    [], [1], ["x"], [None], [[1.0]], [[[]]], [math.nan], {}, {"x": 1}, {"": {}}, {"0": []}, {"texts": []},
)  # fmt: skip
"""What a field may be found to hold."""


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every field, at any depth, and of the whole."""
    yield path
    if isinstance(content, (dict, list)):
        for key in content if isinstance(content, dict) else range(len(content)):
            yield from places(content[key], (*path, key))


def replaced(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The content with another value at a path."""
    if not path:
        return None if value is DROP else value
    content = copy.deepcopy(content)
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    if value is DROP:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return content


@st.composite
def damages(draw: st.DrawFn, content: Any) -> tuple[tuple[Any, ...], Any, Any]:
    """A path, the value that is put there, and the content with it."""
    path = draw(st.sampled_from(list(places(content))))
    value = draw(st.sampled_from(VALUES))
    return path, value, replaced(content, path, value)


def complaint(act: Callable[[], Any]) -> str | None:
    """The message of the ValueError that something raises; None if it raises none. Other errors pass."""
    try:
        act()
    except ValueError as error:
        return str(error)
    return None


def named(path: tuple[Any, ...], message: str) -> bool:
    """Whether a message names the innermost field of a path that has a name, or one around it."""
    names = [str(key) for key in path if isinstance(key, str)]
    return not names or any(name in message for name in names)
