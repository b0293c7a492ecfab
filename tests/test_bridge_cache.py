# SPDX-License-Identifier: BSD-3-Clause
"""Generated source: written once, whole, by any number of processes, wherever there is a place for it."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sale_flex.bridge import cache, describe, program

pytest.importorskip("triton", reason="generated source is for triton, which is not installed")

SOURCE = "import triton\n\nVALUE = 3\n" + "# filler\n" * 5000


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("SALE_FLEX_CACHE_DIR", str(tmp_path / "mods"))
    monkeypatch.setattr(cache, "_modules", {})
    cache._fallback.cache_clear()
    yield tmp_path / "mods"
    cache._fallback.cache_clear()


def test_source_is_a_private_file(own_directory):
    path = cache.store("one.py", SOURCE)
    assert path == own_directory / "one.py"
    assert path.read_text() == SOURCE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(own_directory.stat().st_mode) == 0o700


def test_what_is_there_stays(own_directory):
    path = cache.store("one.py", SOURCE)
    before = path.stat()
    assert cache.store("one.py", SOURCE).stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_ino == before.st_ino


@pytest.mark.parametrize("damage", [SOURCE[:1000], "", SOURCE.replace("3", "4"), "\0" * 50])
def test_what_is_damaged_is_written_again(own_directory, damage):
    cache.store("one.py", SOURCE).write_text(damage)
    assert cache.store("one.py", SOURCE).read_text() == SOURCE
    assert cache.load(SOURCE).VALUE == 3


def test_bytecode_is_neither_kept_nor_taken(own_directory):
    assert cache.load(SOURCE).VALUE == 3
    assert [path.suffix for path in own_directory.iterdir()] == [".py"]


def test_directories_come_from_the_environment(monkeypatch):
    assert cache.directory() == Path(os.environ["SALE_FLEX_CACHE_DIR"])
    monkeypatch.delenv("SALE_FLEX_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.directory() == Path("/somewhere/sale_flex/mods")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.directory() == Path.home() / ".cache/sale_flex/mods"


def test_without_a_directory_a_temporary_one_serves(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SALE_FLEX_CACHE_DIR", str(tmp_path / "file" / "mods"))
    path = cache.store("one.py", SOURCE)
    assert path.read_text() == SOURCE
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert cache.store("one.py", SOURCE) == path


RACE = """
import sys, time
from pathlib import Path
from sale_flex.bridge import cache
source = Path(sys.argv[1]).read_text()
print("ready", flush=True)
sys.stdin.readline()
for i in range(150):
    path = cache.store("raced.py", source)
    assert path.read_text() == source
    if i % 3 == int(sys.argv[2]) % 3:
        path.unlink(missing_ok=True)
    cache.store(f"raced{i}.py", source + str(i))
print(cache.load(source).VALUE)
"""


def test_processes_do_not_disturb_each_other(own_directory, tmp_path):
    # They find the file missing or there, and each sees it whole. Reading it back may meet a process that took it away.
    (tmp_path / "source").write_text(SOURCE)
    script = RACE.replace("    assert path.read_text() == source\n", READ_BACK)
    command = [sys.executable, "-c", script, str(tmp_path / "source")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, str(i)], **pipes) for i in range(4)]
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        out, err = process.communicate(timeout=240)
        assert (process.returncode, out) == (0, "3\n"), err
    assert {path.read_text() for path in own_directory.glob("raced?*.py")} >= {SOURCE + str(i) for i in range(150)}
    assert list(own_directory.glob("*.tmp")) == []


READ_BACK = """
    try:
        assert path.read_text() == source
    except FileNotFoundError:
        pass
"""


def test_a_program_is_generated_and_imported_once(own_directory):
    def make(table):
        return lambda b, h, q, kv: table[q] == table[kv]

    keys = {describe(make(torch.arange(length)), "mask").key for length in (3, 4, 5)}
    assert len(keys) == 1
    found = program(keys.pop())
    assert found.triton is found.triton
    (path,) = own_directory.glob("*.py")
    assert path.read_text() == found.source
    assert cache.load(found.source) is cache.load(found.source)


def test_a_damaged_file_is_mended_before_it_is_imported(own_directory):
    described = describe(lambda b, h, q, kv: q * 3 > kv + 17, "mask")
    found = program(described.key)
    cache.load(found.source)
    (path,) = own_directory.glob("*.py")
    path.write_text("raise RuntimeError('not what was written')")
    cache._modules.clear()
    assert cache.load(found.source).mod is not None
    assert path.read_text() == found.source
