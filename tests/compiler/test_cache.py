# SPDX-License-Identifier: BSD-3-Clause
"""Generated source is made in the process and stays there: what runs is what was emitted, whatever lies on disk."""

import inspect
import linecache
import os
import subprocess
import sys
import threading

import pytest
import torch

from sale_flex.mods.compiler import cache, describe, program

pytest.importorskip("triton", reason="generated source is for triton, which is not installed")

SOURCE = "import triton\n\nVALUE = 3\n\n\n@triton.jit\ndef mod(x, AUX):\n    return x\n"


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(cache, "_modules", {})


def file_of(module) -> str:
    return f"<{module.__name__}>"


def test_a_module_is_made_once():
    assert cache.load(SOURCE).VALUE == 3
    assert cache.load(SOURCE) is cache.load(SOURCE)
    assert cache.load(SOURCE.replace("3", "4")).VALUE == 4


def test_threads_get_one_module():
    barrier, found = threading.Barrier(8), []

    def load():
        barrier.wait()
        found.append(cache.load(SOURCE))

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(map(id, found))) == 1


def test_a_program_is_generated_once_for_tables_of_any_length():
    def make(table):
        return lambda b, h, q, kv: table[q] == table[kv]

    keys = {describe(make(torch.arange(length)), "mask").key for length in (3, 4, 5)}
    assert len(keys) == 1
    found = program(keys.pop())
    assert found.triton is found.triton
    assert cache.load(found.source) is cache.load(found.source)


def test_triton_reads_the_text_that_was_executed():
    module = cache.load(SOURCE)
    lines, first = inspect.getsourcelines(module.mod.fn)
    assert SOURCE.splitlines(keepends=True)[first - 1 :] == lines


def test_a_file_of_the_same_name_is_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = file_of(cache.load(SOURCE))
    (tmp_path / name).write_text(SOURCE.replace("return x", "return x + 1"))
    monkeypatch.syspath_prepend(tmp_path)
    # Everything that drops stale entries has run; the entry is there all the same.
    linecache.checkcache()
    linecache.checkcache(name)
    assert "".join(inspect.getsourcelines(cache.load(SOURCE).mod.fn)[0]).endswith("return x\n")


def test_a_file_of_the_same_name_is_not_read_when_the_lines_are_gone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = cache.load(SOURCE)
    (tmp_path / file_of(module)).write_text(SOURCE.replace("return x", "return x + 1"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(linecache, "cache", {})
    with pytest.raises(OSError, match="could not get source code"):
        inspect.getsourcelines(module.mod.fn)


ATTACK = """
import builtins, io, os, sys
writes, reads = [], []

def spy(event, args):
    if event != "open" or not isinstance(args[0], (str, bytes, os.PathLike)):
        return
    path, mode, flags = os.fsdecode(args[0]), args[1], args[2]
    if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        writes.append(path)
    elif "sale_flex_mod" in path:
        reads.append(path)

import torch, triton
from sale_flex.mods.compiler import describe, program
key = describe(lambda b, h, q, kv: q * 3 > kv + 17, "mask").key
sys.addaudithook(spy)
function = program(key).triton
source = getattr(function, "src", None)
print(writes, reads, source is None or source in program(key).source)
"""


@pytest.mark.parametrize("interpreted", ["0", "1"])
def test_no_file_is_written_or_read(tmp_path, interpreted):
    # Folders that anyone may write to, wherever earlier versions put files.
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    places = dict.fromkeys(("SALE_FLEX_CACHE_DIR", "XDG_CACHE_HOME", "HOME", "TMPDIR"), str(shared))
    environment = {**os.environ, **places, "TRITON_INTERPRET": interpreted, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", ATTACK]
    done = subprocess.run(command, capture_output=True, text=True, cwd=shared, env=environment)
    assert done.stdout == "[] [] True\n", done.stderr
    assert [path for path in shared.rglob("*") if "mod" in path.name] == []
