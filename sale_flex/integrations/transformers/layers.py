# SPDX-License-Identifier: BSD-3-Clause
"""A model's attention layers, and what each of them knows of sale_flex."""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sale_flex.call.facts import EVERY_ROW
from sale_flex.clock import Clock
from sale_flex.config import SaleConfig
from sale_flex.integrations.transformers.refused import NAME
from sale_flex.integrations.transformers.towers import towers_of

_STATE = "_sale_flex"
"""Attribute of an attention module that holds its `LayerState`."""

_CROSS = "_sale_flex_cross"
"""Attribute of a decoder layer's cross-attention, which counts in the `LayerState` of its layer."""

DENSE_CONFIG = SaleConfig(min_length=EVERY_ROW)
"""Of layers that keep everything."""

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
        blocks: int64 ``[5, Hq]``: kept, visible and dropped blocks of each head, of prefill; audited rows, and calls in
            which the head was made dense.
        masses: float32 ``[3, Hq]``: what audited rows wanted, missed, and the squares of that.
        paths: How often `SaleStats.describe` said what in prefill, outside compiled programs.
        clock: Time of choosing blocks and of attention in prefill, outside compiled programs.
    """

    def __init__(self, config: SaleConfig, heads: int, device: torch.device) -> None:
        self.config = config
        self.observer: Callable[[Any], Tensor] | None = None
        with _lasting():
            self.calls = _counter(3, device=device)
            self.blocks = _counter(5, heads, device=device)
            self.masses = _counter(3, heads, device=device, dtype=torch.float32)
        self.paths: Counter[str] = Counter()
        self.clock = Clock()

    def move(self, device: torch.device) -> None:
        """Follow the layer to another device."""
        with _lasting():
            for name in ("calls", "blocks", "masses"):
                before = getattr(self, name)
                setattr(self, name, _counter(*before.shape, device=device, dtype=before.dtype))
                getattr(self, name).copy_(before)
            threshold = self.config.rule.threshold
            if isinstance(threshold, Tensor):
                self.config = self.config.with_threshold(threshold.to(device))

    def reset(self) -> None:
        """Count from 0 again."""
        self.calls.zero_()
        self.blocks.zero_()
        self.masses.zero_()
        self.paths.clear()
        self.clock.reset()


def _lasting() -> AbstractContextManager[Any]:
    """Where tensors are made that may change at any later time: not in inference mode. A traced program has its own."""
    return nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False)


def _counter(*shape: int, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Counts that compiled programs add to; CUDA graphs are only made of those whose changed tensors stay in place."""
    counts = torch.zeros(shape, dtype=dtype, device=device)
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(counts)
    return counts


def state_of(module: torch.nn.Module) -> LayerState | None:
    """What an attention module knows; None before `configure`."""
    return getattr(module, _STATE, None)


def set_state(module: torch.nn.Module, state: LayerState, cross: bool = False) -> None:
    """Let an attention module know.

    Args:
        module: The attention module.
        state: Its own, or, of cross-attention, that of the self-attention in its layer.
        cross: Whether it is cross-attention.
    """
    setattr(module, _STATE, state)
    setattr(module, _CROSS, cross)


def is_cross(module: torch.nn.Module) -> bool:
    """Whether a configured attention module is a decoder layer's cross-attention."""
    return getattr(module, _CROSS, False)


def device_of(module: torch.nn.Module) -> torch.device:
    """Where a layer will run, as far as its parameters tell: offloaded ones, and those still to be loaded, do not."""
    return next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))


def attention_layers(model: torch.nn.Module) -> dict[int, torch.nn.Module]:
    """The model's attention modules by their layer index, ascending: those that `configure` configures.

    Linear-attention layers are not among them. Of an encoder-decoder, they are the decoder's self-attention.

    Raises:
        UnsupportedModelError: sale_flex does not compute the model's attention; a ValueError and NotImplementedError.
        ValueError: There are none, or two with the same index, as in a model of two towers.
    """
    return towers_of(model).layers


def check_implementation(layers: Mapping[int, torch.nn.Module]) -> None:
    """Raise ValueError if one of these attention modules runs another implementation than sale_flex."""
    for index, module in layers.items():
        name = getattr(getattr(module, "config", None), "_attn_implementation", NAME)
        if name != NAME:
            raise ValueError(
                f"model must run attn_implementation={NAME!r}, but layer {index} ({type(module).__name__}) runs "
                f"{name!r}; load it with attn_implementation={NAME!r} or call model.set_attn_implementation({NAME!r}). "
                "A model that stays as it was then has attention of its own, which sale_flex can not take over."
            )


def query_heads(module: torch.nn.Module) -> int:
    """Query heads of an attention module, of all processes together under tensor parallelism."""
    config = getattr(module, "config", None)
    # The module's own first: configs of encoders with decoders have two numbers, and tell the encoder's.
    for owner, name in ((module, "num_heads"), (config, "num_attention_heads"), (module, "num_attention_heads")):
        heads = getattr(owner, name, None)
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
