# SPDX-License-Identifier: BSD-3-Clause
"""Messages name flags that the command has."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_flags import FLAG, flags_of

import sale_flex

ROOT = Path(sale_flex.__file__).parent

OWNERS: dict[str, tuple[str, ...]] = {
    "bench/__init__.py": ("bench",),
    "bench/captured.py": ("bench",),
    "bench/captured.py:write_captured": ("capture",),
    "bench/capture.py": ("capture",),
    "bench/configs.py": ("bench",),
    "bench/configs.py:parse_config": ("calibrate",),
    "bench/model.py": ("capture",),
    "bench/plan.py": ("bench",),
    "bench/plan.py:find_device": ("bench", "capture"),
    "bench/plot.py": ("bench",),
    "bench/results.py": ("bench",),
    "calibration/artefact.py": ("calibrate",),
    "calibration/command.py": ("calibrate",),
    "calibration/record.py": ("calibrate",),
    "calibration/view.py": ("inspect",),
    "cli.py": ("info", "demo", "bench", "capture", "eval", "calibrate", "inspect"),
    **{f"eval/{name}.py": ("eval",) for name in ("command", "record", "rules", "sequences")},
    "demo/__init__.py": ("demo",),
    "demo/run.py": ("demo",),
}
"""File, or function of one -> the commands whose messages it writes."""
OTHERS = {
    "_console/provenance.py:git": "git",
    "_console/provenance.py:_commit": "git",
    "integrations/transformers/__init__.py": "pip",
}
"""The same -> another program whose flags it names."""


def strings(tree: ast.AST, function: str = "") -> Iterator[tuple[str, str]]:
    """Every string but docstrings, with the outermost function that it is in."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.JoinedStr):
            # One message: what stands between the braces is of no interest, but may be a string itself.
            yield function, "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
            for part in node.values:
                yield from strings(part, function)
        elif isinstance(node, ast.Constant):
            if isinstance(node.value, str):
                yield function, node.value
        else:
            inside = function
            if isinstance(node, ast.FunctionDef):
                # Defaults are what one caller passes, not what the function says to all of them.
                node.args.defaults, node.args.kw_defaults = [], []
                inside = function or node.name
            yield from strings(node, inside)


def named_flags() -> list[tuple[str, str, str]]:
    """File, function and the message, where it names a flag."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        for function, text in strings(ast.parse(path.read_text("utf-8"))):
            if FLAG.search(text):
                found.append((name, function, text))
    return found


def borrowed(files: str) -> set[tuple[str, str]]:
    """Files and functions of the benchmark that another command calls too, whose code is in some files."""
    trees = [ast.parse(path.read_text("utf-8")) for path in ROOT.glob(files)]
    froms = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {
        (f"{node.module.removeprefix('sale_flex.').replace('.', '/')}.py", alias.name)
        for node in froms
        for alias in node.names
        if node.module.startswith("sale_flex.bench.")
    }


NAMED = named_flags()
BORROWED = {"calibrate": borrowed("calibration/command.py"), "eval": borrowed("eval/*.py")}


def test_the_search_finds_messages():
    assert len(NAMED) > 80
    assert {("bench/model.py", name) for name in ("find", "load", "text_files", "read_tokens")} <= BORROWED["calibrate"]
    assert any(function == "find_device" and "got {}; torch finds" in text for _, function, text in NAMED)
    used = {key for name, function, _ in NAMED for key in (name, f"{name}:{function}")}
    assert {*OWNERS, "integrations/transformers/__init__.py"} <= used


@pytest.mark.parametrize(("name", "function"), sorted({(name, function) for name, function, _ in NAMED}))
def test_messages_name_flags_that_there_are(name, function):
    for owner in (f"{name}:{function}", name):
        if owner in OTHERS:
            return
    commands = OWNERS.get(f"{name}:{function}", OWNERS.get(name))
    if commands:
        commands = (*commands, *(command for command, those in BORROWED.items() if (name, function) in those))
    assert commands is not None, f"{name} names flags: whose are they?"
    for text in (text for *place, text in NAMED if place == [name, function]):
        of_another = re.search(r"sale-flex ([a-z]+)`? [^`;,]*--", text)
        for command in [of_another[1]] if of_another else commands:
            unknown = set(FLAG.findall(text)) - flags_of(command)
            assert not unknown, f"sale-flex {command} has no {unknown}: {text!r}"
