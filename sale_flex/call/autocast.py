# SPDX-License-Identifier: BSD-3-Clause
"""Mixed precision by torch.autocast, as scaled_dot_product_attention takes it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

# Asked once: torch.compile traces no such question in torch 2.11.
_DEVICE_TYPES = frozenset(x for x in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(x))


def autocast_inputs(query: Any, *others: Any) -> tuple[Any, ...]:
    """What autocast makes of the inputs of scaled_dot_product_attention; where it is off, they stay as they are.

    Floating-point tensors get autocast's dtype, but float64 stays. So does what is no tensor, for others to refuse.

    Args:
        query: The autocast of its device type is the one that counts.
        others: What goes with it.

    Returns:
        `query`, and the others. Gradients pass.
    """
    inputs = (query, *others)
    if not _applies(query):
        return inputs
    dtype = torch.get_autocast_dtype(query.device.type)
    return tuple(x.to(dtype) if _is_cast(x) else x for x in inputs)


def without_autocast(query: Any) -> AbstractContextManager[Any]:
    """A region in which autocast casts nothing more on the query's device.

    A block mask's arithmetic chooses its dtypes so that integers stay exact; autocast would round its products.
    """
    return torch.autocast(query.device.type, enabled=False) if _applies(query) else nullcontext()


@contextmanager
def without_any_autocast() -> Iterator[None]:
    """The same of every device: torch guards its programs on all of them."""
    with ExitStack() as stack:
        for device_type in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


def _applies(query: Any) -> bool:
    if not isinstance(query, Tensor):
        return False
    device = query.device.type
    return device in _DEVICE_TYPES and torch.is_autocast_enabled(device)


def _is_cast(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
