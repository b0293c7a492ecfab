# SPDX-License-Identifier: BSD-3-Clause
"""Generated source as modules of this process. None of it goes to disk, where others could change what is run."""

import hashlib
import linecache
import sys
import threading
from types import ModuleType

_lock = threading.Lock()
_modules: dict[str, ModuleType] = {}


def load(source: str) -> ModuleType:
    """The module of a source text, made at most once a process.

    Triton reads a function's source a second time, by `inspect`. It finds this text in `linecache` under a name that is
    no path, so that no file is opened for it, now or later.
    """
    name = f"sale_flex_mod_{hashlib.sha256(source.encode()).hexdigest()[:32]}"
    with _lock:
        if name not in _modules:
            _modules[name] = _make(name, source)
        return _modules[name]


def _make(name: str, source: str) -> ModuleType:
    file = f"<{name}>"
    # Without a modification time, linecache compares the entry with no file.
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    module = ModuleType(name)
    sys.modules[name] = module  # inspect looks modules up here
    exec(compile(source, file, "exec"), vars(module))
    return module
