# SPDX-License-Identifier: BSD-3-Clause
"""A model's attention layers, and what each of them knows of sale_flex."""

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sale_flex.clock import Clock
from sale_flex.config import SaleConfig

_STATE = "_sale_flex"
"""Attribute of an attention module that holds its `LayerState`."""

SPARSE, DENSE, DECODE = range(3)
"""Kinds of calls, and their places in `LayerState.calls`."""


class LayerState:
    """What an attention layer does, and did.

    Counts are tensors on the layer's device, so that nobody waits for them and compiled programs can keep them. That
    device is where its queries are: parameters may be elsewhere until they are needed, or on none.

    Attributes:
        config: What to keep.
        observer: Who takes the layer's calls instead of sale_attention, if anybody.
        calls: int64 ``[3]``: calls that ran sparse, prefill that ran dense, decoding steps.
        blocks: int64 ``[3, Hq]``: kept, visible and dropped blocks of each head, of prefill.
        paths: How often each path of `SaleStats.path` ran in prefill, outside compiled programs.
        clock: Time of choosing blocks and of attention in prefill, outside compiled programs.
    """

    def __init__(self, config: SaleConfig, heads: int, device: torch.device) -> None:
        self.config = config
        self.observer: Callable[[Any], Tensor] | None = None
        with _lasting():
            self.calls = _counter(3, device=device)
            self.blocks = _counter(3, heads, device=device)
        self.paths: Counter[str] = Counter()
        self.clock = Clock()

    def move(self, device: torch.device) -> None:
        """Follow the layer to another device."""
        with _lasting():
            calls, blocks = self.calls, self.blocks
            self.calls, self.blocks = _counter(*calls.shape, device=device), _counter(*blocks.shape, device=device)
            self.calls.copy_(calls)
            self.blocks.copy_(blocks)
            if isinstance(self.config.threshold, Tensor):
                self.config = replace(self.config, threshold=self.config.threshold.to(device))

    def reset(self) -> None:
        """Count from 0 again."""
        self.calls.zero_()
        self.blocks.zero_()
        self.paths.clear()
        self.clock.reset()


def _lasting() -> AbstractContextManager[Any]:
    """Where tensors are made that may change at any later time: not in inference mode. A traced program has its own."""
    return nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False)


def _counter(*shape: int, device: torch.device) -> Tensor:
    """Counts that compiled programs add to; CUDA graphs are only made of those whose changed tensors stay in place."""
    counts = torch.zeros(shape, dtype=torch.int64, device=device)
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(counts)
    return counts


def state_of(module: torch.nn.Module) -> LayerState | None:
    """What an attention module knows; None before `configure`."""
    return getattr(module, _STATE, None)


def set_state(module: torch.nn.Module, state: LayerState) -> None:
    """Let an attention module know."""
    setattr(module, _STATE, state)


def device_of(module: torch.nn.Module) -> torch.device:
    """Where a layer will run, as far as its parameters tell: offloaded ones, and those still to be loaded, do not."""
    return next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))


def attention_layers(model: torch.nn.Module) -> dict[int, torch.nn.Module]:
    """The model's attention modules by their layer index, ascending; linear-attention layers are not among them.

    Raises:
        ValueError: There are none, or two with the same index, as in a model of two towers.
    """
    found: dict[int, torch.nn.Module] = {}
    for name, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or not hasattr(module, "is_causal"):
            continue
        if index in found:
            raise ValueError(
                f"model must have one attention module per layer index, but {name!r} is the second with index {index}; "
                "pass the part that is to be sparse, such as model.model.language_model."
            )
        found[index] = module
    if not found:
        raise ValueError(
            "model must have attention modules of transformers, with a layer_idx and is_causal, but "
            f"{type(model).__name__} has none."
        )
    return dict(sorted(found.items()))


def query_heads(module: torch.nn.Module) -> int:
    """Query heads of an attention module, of all processes together under tensor parallelism."""
    config = getattr(module, "config", None)
    for owner in (config, module):
        heads = getattr(owner, "num_attention_heads", None)
        if isinstance(heads, int):
            return heads
    raise ValueError(f"{type(module).__name__} must tell its num_attention_heads, itself or in its config.")


def layer_states(model: torch.nn.Module) -> dict[int, LayerState]:
    """The state of every attention layer.

    Raises:
        ValueError: `configure` was not called on the model.
    """
    states = {index: state_of(module) for index, module in attention_layers(model).items()}
    known = {index: state for index, state in states.items() if state is not None}
    if len(known) < len(states):
        raise ValueError(
            "model must be configured first: call sale_flex.integrations.transformers.configure(model, SaleConfig())."
        )
    return known
