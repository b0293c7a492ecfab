# SPDX-License-Identifier: BSD-3-Clause
"""What a caller has switched on around a call of ours, set aside while our own tracing and our own programs run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._C import _len_torch_function_stack
from torch._ops import _get_dispatch_mode_pre_dispatch, _len_torch_dispatch_stack_pre_dispatch
from torch.overrides import _pop_mode, _push_mode
from torch.utils import _python_dispatch as dispatch
from torch.utils._device import DeviceContext

_PRE_DISPATCH = (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FUNCTIONAL)
"""Kinds of modes that an export of undecomposed ops puts before all others."""

_FLAGS = (
    "_is_in_torch_dispatch_mode",
    "_is_in_non_infra_torch_dispatch_mode",
    "_is_in_any_mode_without_ignore_compile_internals",
)
"""By which torch knows that it is inside a dispatch mode; which of them there are is a matter of its version."""


def dispatch_modes() -> list[Any]:
    """The TorchDispatchModes that are on in this thread."""
    modes = dispatch._get_current_dispatch_mode_stack()
    if _len_torch_dispatch_stack_pre_dispatch():
        modes += [x for x in map(_get_dispatch_mode_pre_dispatch, _PRE_DISPATCH) if x is not None]
    return modes


@contextmanager
def without_modes() -> Iterator[None]:
    """Set the dispatch modes and the function modes of the thread aside, all but torch's default device.

    Torch compiles nothing inside most dispatch modes, guards programs on function modes, and either kind would see what
    we trace as if the caller had asked for it.
    """
    if not dispatch_modes() and not _len_torch_function_stack():
        yield
        return
    functions = [_pop_mode() for _ in range(_len_torch_function_stack())]
    devices = [mode for mode in functions if isinstance(mode, DeviceContext)]
    try:
        for mode in reversed(devices):
            _push_mode(mode)
        with dispatch._disable_current_modes(), _without_flags():
            yield
    finally:
        for _ in devices:
            _pop_mode()
        for mode in reversed(functions):
            _push_mode(mode)


@contextmanager
def _without_flags() -> Iterator[None]:
    before = {name: getattr(dispatch, name) for name in _FLAGS if hasattr(dispatch, name)}
    tell_guards = getattr(dispatch, "set_is_in_mode_without_ignore_compile_internals", lambda inside: None)
    for name in before:
        setattr(dispatch, name, False)
    tell_guards(False)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(dispatch, name, value)
        tell_guards(before.get(_FLAGS[-1], False))
