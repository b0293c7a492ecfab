# SPDX-License-Identifier: BSD-3-Clause
"""What is in the distributions, and that they work: `kernels/` is mapped into the package by pyproject.toml alone."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import sale_flex

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("setuptools", minversion="77.0.3", reason="builds with the setuptools at hand")


def build(kind: str, tree: Path, out: Path) -> Path:
    """Build a ``wheel`` or an ``sdist`` from a source tree, offline, with pyproject.toml's backend."""
    out.mkdir(exist_ok=True)
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(out)], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, so that the checkout is left without build folders."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    for name in ("kernels", "sale_flex"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    return build("wheel", tree, tree.parent / "from-tree")


def files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_wheel_holds_every_source_file_and_the_model(wheel, tree):
    expected = {path.relative_to(tree).as_posix() for path in (tree / "sale_flex").rglob("*") if path.is_file()}
    expected |= {f"sale_flex/kernels/{path.name}" for path in (tree / "kernels").glob("*.py")}
    assert files(wheel) == expected
    assert "sale_flex/py.typed" in expected
    assert "sale_flex/kernels/__init__.py" in expected
    assert any(name.startswith("sale_flex/demo/model/") for name in expected)


def test_source_distribution_builds_the_same_wheel(wheel, tree, tmp_path):
    sdist = build("sdist", tree, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert files(build("wheel", unpacked, tmp_path / "from-sdist")) == files(wheel)


def test_metadata(wheel):
    fields = metadata(wheel)
    assert fields["Name"] == "sale-flex"
    assert fields["Version"] == sale_flex.__version__
    assert fields["License-Expression"] == "BSD-3-Clause"
    assert fields["Requires-Python"] == ">=3.11"
    required = [text for text in fields.get_all("Requires-Dist") if "extra ==" not in text]
    assert required == ["torch>=2.11"]
    assert set(fields.get_all("Provides-Extra")) == {"bench", "demo", "eval", "hf", "viz", "test", "dev", "docs"}


def test_nothing_is_pinned_to_one_patch_version(wheel):
    assert [text for text in metadata(wheel).get_all("Requires-Dist") if "==" in text.split(";")[0]] == []


def test_wheel_works_away_from_the_checkout(wheel, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import pathlib, sale_flex, sale_flex.kernels, sale_flex.cli\n"
        "for module in sale_flex, sale_flex.kernels: print(module.__file__)\n"
        "raise SystemExit(sale_flex.cli.main(['info', '--json', '-']) != 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    package, kernels = done.stdout.splitlines()[:2]
    assert Path(package) == site / "sale_flex" / "__init__.py"
    assert Path(kernels) == site / "sale_flex" / "kernels" / "__init__.py"
