# SPDX-License-Identifier: BSD-3-Clause
"""One attention call of a model's prefill, and a way to look at every one of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sale_flex.integrations.transformers.layers import attention_layers, check_implementation, layer_states


class AttentionCall(NamedTuple):
    """What a layer's attention is asked to compute."""

    layer: int
    """The layer's index in the model."""
    query: Tensor
    """``[B, Hq, Sq, D]``; under tensor parallelism the heads of this process."""
    key: Tensor
    """``[B, Hkv, Skv, D]``."""
    value: Tensor
    """``[B, Hkv, Skv, D]``."""
    options: dict[str, Any]
    """Keyword arguments of sale_attention, all but `config`."""


Observer = Callable[[AttentionCall], Tensor]
"""Takes a call and returns its output ``[B, Hq, Sq, D]``."""


@contextmanager
def observe(model: torch.nn.Module, observer: Observer) -> Iterator[None]:
    """Hand every attention call of the model's prefill to `observer`, whose output the model goes on with.

    Decoding steps, cross-attention, and calls under a mask tensor of the user's, do not pass by. Not for compiled
    models.

    Args:
        model: A model that `configure` was called on.
        observer: Called once per layer and forward pass.

    Raises:
        ValueError: `configure` was not called, or a layer runs another attn_implementation by now.
    """
    states = layer_states(model)
    check_implementation(attention_layers(model))
    before = [state.observer for state in states.values()]
    for state in states.values():
        state.observer = observer
    try:
        yield
    finally:
        for state, old in zip(states.values(), before):
            state.observer = old
