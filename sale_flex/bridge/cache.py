# SPDX-License-Identifier: BSD-3-Clause
"""Generated source on disk and in the process: Triton reads the source of what it compiles from a file."""

import hashlib
import importlib.util
import os
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path
from types import ModuleType

_lock = threading.Lock()
_modules: dict[str, ModuleType] = {}


def directory() -> Path:
    """Where source goes: ``SALE_FLEX_CACHE_DIR``, else ``sale_flex/mods`` in the user's cache directory."""
    chosen = os.environ.get("SALE_FLEX_CACHE_DIR")
    if chosen:
        return Path(chosen)
    cache_home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache_home) / "sale_flex" / "mods"


@cache
def _fallback() -> Path:
    return Path(tempfile.mkdtemp(prefix="sale_flex_mods_"))


def load(source: str) -> ModuleType:
    """The module of a source text, written and imported at most once a process."""
    import triton

    digest = hashlib.sha256(f"{triton.__version__}\n{source}".encode()).hexdigest()
    name = f"sale_flex_mod_{digest[:32]}"
    with _lock:
        if name not in _modules:
            _modules[name] = _import(name, store(f"{name}.py", source), source)
        return _modules[name]


def store(file: str, source: str) -> Path:
    """Make sure that a file with exactly this content is there, in a private temporary directory if need be."""
    try:
        return _store(directory() / file, source)
    except OSError:
        return _store(_fallback() / file, source)


def _store(path: Path, source: str) -> Path:
    data = source.encode()
    try:
        if path.read_bytes() == data:
            return path
    except OSError:
        pass
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Made with mode 0600. Another process may put the same file there at the same time: one of them stays, whole.
    handle, temporary = tempfile.mkstemp(prefix=path.stem, suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _import(name: str, path: Path, source: str) -> ModuleType:
    """The module, made from `source`: bytecode beside the file could be another's."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # inspect looks modules up here
    exec(compile(source, str(path), "exec"), vars(module))
    return module
