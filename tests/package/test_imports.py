# SPDX-License-Identifier: BSD-3-Clause
"""What importing costs, and what may import what: DESIGN.md, "Files and arrows"."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import sale_flex

ROOT = Path(__file__).resolve().parents[2]

ARROWS: dict[str, set[str]] = {
    "_console": {"", "config", "selection"},
    "attention": {"call", "clock", "config", "flex", "mods", "selection", "stats"},
    "bench": {"_console", "attention", "block_mask", "call", "config", "flex", "ops", "selection", "stats", "testing"},
    "block_mask": {"call", "config", "mods", "selection", "stats"},
    "blocks": {"kernels.arguments"},
    "calibration": {
        "",
        "_console",
        "attention",
        "bench",
        "blocks",
        "call",
        "config",
        "flex",
        "integrations",
        "kernels.arguments",
        "ops",
        "selection",
        "stats",
    },
    "call": {"blocks", "config", "kernels.arguments", "mods", "mods.compiler", "ops", "selection", "stats"},
    "cli": {"", "_console"},
    "clock": set(),
    "config": {"selection"},
    "demo": {"", "_console", "testing"},
    "eval": {"_console", "bench", "calibration", "config", "demo", "integrations", "selection"},
    "flex": {"blocks", "call", "mods", "mods.compiler", "ops"},
    "info": {"_console", "config", "flex"},
    "integrations": {"attention", "call", "clock", "config", "mods", "ops", "selection", "stats"},
    "kernels": set(),
    "kernels.arguments": set(),
    "mods": set(),
    "mods.compiler": set(),
    "ops": {"blocks", "kernels.arguments", "mods.compiler"},
    "ops.fallback": {"blocks", "kernels.arguments"},
    "reference": set(),
    "selection": {"blocks", "kernels.arguments", "ops", "ops.fallback"},
    "stats": {"blocks", "kernels.arguments"},
    "testing": {"config", "mods", "reference", "selection"},
}
"""Module (or folder) of sale_flex -> the others it may import, at any depth of its code; "" is the package itself.

What is imported under ``if TYPE_CHECKING:`` are types alone and no arrows: rules are told about `Call`, and a `Call`
holds a config with a rule. Nor is what is loaded by name when it is asked for: subcommands of `cli`, kernels of `ops`.
"""

PARTS = ("kernels.arguments", "mods.compiler", "ops.fallback")
"""Folders and files inside others with arrows of their own."""

FOREIGN = {
    "bench": {"matplotlib", "rich", "safetensors", "torch", "transformers"},
    "calibration": {"huggingface_hub", "matplotlib", "rich", "safetensors", "torch", "transformers"},
    "demo": {"matplotlib", "rich", "safetensors", "tokenizers", "torch", "transformers"},
    "eval": {"gguf", "jinja2", "matplotlib", "torch"},
    "integrations": {"torch", "transformers"},
    "kernels": {"torch", "triton"},
    "_console": {"rich", "torch", "transformers"},
    "mods.compiler": {"torch", "triton"},
    "testing": {"hypothesis", "torch"},
}
"""Module -> what it may import beside the standard library; torch alone if not listed."""


def owner_of(name: str) -> str:
    """The part of sale_flex that a dotted name inside it belongs to."""
    part = next((part for part in PARTS if f"{name}.".startswith(f"{part}.")), None)
    return part or name.partition(".")[0]


def sources() -> Iterator[tuple[str, Path]]:
    """Every source file with its owner's name in `ARROWS`."""
    for path in sorted((ROOT / "sale_flex").rglob("*.py")):
        yield owner_of(".".join(path.relative_to(ROOT / "sale_flex").with_suffix("").parts)), path
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        yield owner_of(".".join(("kernels", *path.relative_to(ROOT / "kernels").with_suffix("").parts))), path


def imports(path: Path) -> Iterator[str]:
    """Absolute names that a file imports, wherever in the file, but for types alone."""
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            nodes += node.orelse
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield f".{node.module or ''}"
            else:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            nodes += ast.iter_child_nodes(node)


def python(code: str, *options: str, cwd: Path, path: Path | None = None) -> str:
    """Output of a fresh interpreter that runs `code`."""
    environment = dict(os.environ)
    environment.pop("PYTHONPATH", None)
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_torch_alone(tmp_path):
    # FlexAttention belongs to torch; whatever it draws in is torch's own business.
    code = (
        "import sys, torch.nn.attention.flex_attention\n"
        "before = set(sys.modules)\n"
        "import sale_flex\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    added = set(python(code, cwd=tmp_path).split())
    assert added - sys.stdlib_module_names <= {"sale_flex", "torch"}


def test_importing_the_package_leaves_the_optional_alone(tmp_path):
    owners = ("bench", "calibration", "demo", "testing", "kernels")
    optional = set().union(*(FOREIGN[owner] for owner in owners)) - {"torch"}
    code = (
        "import sys, sale_flex\n"
        f"print(*({optional!r} & set(sys.modules)))\n"
        "print(*(name for name in sys.modules if name.startswith('sale_flex.kernels.')))"
    )
    assert python(code, cwd=tmp_path) == "sale_flex.kernels.arguments"


def test_public_names_are_those_of_all():
    public = {
        name for name, value in vars(sale_flex).items() if not name.startswith("_") and not isinstance(value, type(sys))
    }
    assert public | {"__version__"} == set(sale_flex.__all__)
    assert sale_flex.__all__ == sorted(sale_flex.__all__)


def test_every_module_has_its_arrows():
    owners = {owner for owner, _ in sources()} - {"__init__", "__main__"}
    assert owners == set(ARROWS)


def test_no_arrows_go_round_in_a_circle():
    # But for those to the package itself, which draws in the others and is there before any of them.
    TopologicalSorter({owner: others - {""} for owner, others in ARROWS.items()}).prepare()


@pytest.mark.parametrize(
    ("owner", "path"),
    [pytest.param(*source, id=str(source[1].relative_to(ROOT))) for source in sources()],
)
def test_imports_follow_the_arrows(owner, path):
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "":
            assert owner == "kernels", f"{name}: only kernels import relatively, to stand alone"
        elif top == "sale_flex":
            if owner in ("__init__", "__main__"):
                continue
            target = owner_of(rest)
            target = target if target in ARROWS else ""
            assert target in ARROWS[owner] | {owner}, f"{owner} must not import {name}"
        elif top not in sys.stdlib_module_names:
            assert top in FOREIGN.get(owner, {"torch"}), f"{owner} must not import {name}"


@pytest.fixture
def other_kernels(tmp_path):
    """A folder with a package that is called `kernels` as Hugging Face's is."""
    package = tmp_path / "elsewhere" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from .inside import CUDAProperties\n")
    (package / "inside.py").write_text("class CUDAProperties: pass\n")
    return package.parent


def test_kernels_steps_aside_for_another_package_of_that_name(other_kernels):
    code = (
        "import kernels, kernels.inside\n"
        "from kernels import CUDAProperties\n"
        "import sale_flex.kernels\n"
        "print(kernels.__file__)\n"
        "print(sale_flex.kernels.__file__)"
    )
    theirs, ours = python(code, cwd=ROOT, path=other_kernels).splitlines()
    assert Path(theirs) == other_kernels / "kernels" / "__init__.py"
    assert Path(ours) == ROOT / "kernels" / "__init__.py"


def test_kernels_is_harmless_where_there_is_no_other():
    # -S: without site-packages, in which the other package may be installed.
    code = "import kernels; print(kernels.__file__)"
    assert Path(python(code, "-S", cwd=ROOT)) == ROOT / "kernels" / "__init__.py"
