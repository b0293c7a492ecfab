# SPDX-License-Identifier: BSD-3-Clause
"""`configure`: what each attention layer of a model keeps."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sale_flex.call.facts import EVERY_ROW
from sale_flex.config import SaleConfig
from sale_flex.integrations.transformers.caches import hand_over_cache
from sale_flex.integrations.transformers.layers import (
    DENSE_CONFIG,
    LayerState,
    check_implementation,
    device_of,
    query_heads,
    set_state,
    state_of,
)
from sale_flex.integrations.transformers.measured import say_measured
from sale_flex.integrations.transformers.parallel import local_heads
from sale_flex.integrations.transformers.towers import towers_of


@runtime_checkable
class ConfigByLayer(Protocol):
    """Something that knows what each layer keeps, such as a `sale_flex.Calibration`."""

    def check_fits(self, layers: Mapping[int, int]) -> None:
        """Raise ValueError unless it is for a model with these layers, layer index -> query heads."""

    def layer_config(self, layer: int) -> SaleConfig:
        """The config of a layer, with a threshold for every query head of the model."""


@runtime_checkable
class ConfigOfWeights(ConfigByLayer, Protocol):
    """One that also knows of which weights it holds, such as a `sale_flex.Calibration`."""

    def check_weights(self, model: torch.nn.Module) -> None:
        """Warn if the model has others."""


def configure(
    model: torch.nn.Module,
    config: SaleConfig | ConfigByLayer | Mapping[int, SaleConfig | None] = SaleConfig(),  # noqa: B008 - frozen
) -> None:
    """Say what a model's attention layers keep, and begin to count what they do.

    The model may be on any device, offloaded, or not loaded yet: counts and thresholds are where a layer runs from its
    first call on.

    Of an encoder-decoder, layers are the decoder's self-attention. Its cross-attention stays dense and counts as such
    in the layer that it is in; its encoder stays dense, unless it is configured afterwards, as a part.

    Args:
        model: A model of transformers with ``attn_implementation="sale_flex"``, or a part of one.
        config: One for all layers; a `Calibration`, with thresholds per layer and head; or a mapping from layer indices
            to configs, of which None makes a layer dense. Thresholds per head are for all heads: under tensor
            parallelism each process takes those of its own.

    Raises:
        TypeError, ValueError: `config` does not fit the model; the message names both. The model is left as it was.
        ValueError: A layer runs another attn_implementation.
        UnsupportedModelError: sale_flex does not compute the model's attention; a ValueError and NotImplementedError.

    Warns:
        UserWarning: A `Calibration` is of a model with other weights; or the config estimates by moments, and the
            model is of a family on which that is not known to be safe. Where a family was measured is logged at INFO.
    """
    layers, cross, encoder = towers_of(model)
    check_implementation(layers)
    heads = {index: query_heads(module) for index, module in layers.items()}
    configs = _per_layer(config, heads)
    if isinstance(config, ConfigOfWeights):
        config.check_weights(model)
    states = {}
    for index, module in layers.items():
        device = device_of(module)
        mine = local_heads(model, heads[index])
        states[index] = LayerState(_local(configs[index], heads[index], mine, device), mine.stop - mine.start, device)
    for index, module in layers.items():
        if state_of(module) is None:
            hand_over_cache(module)
        set_state(module, states[index])
        for other in cross.get(index, []):
            set_state(other, states[index], cross=True)
    for module in encoder:
        set_state(module, _dense_state(module))
    say_measured(model, configs.values())


def _dense_state(module: torch.nn.Module) -> LayerState:
    """Of an encoder's module beside a decoder; nobody reads what it counts."""
    return LayerState(DENSE_CONFIG, query_heads(module), device_of(module))


def _per_layer(config: Any, heads: Mapping[int, int]) -> dict[int, SaleConfig]:
    if isinstance(config, SaleConfig):
        return dict.fromkeys(heads, config)
    if isinstance(config, ConfigByLayer):
        config.check_fits(heads)
        return {index: config.layer_config(index) for index in heads}
    if not isinstance(config, Mapping):
        raise TypeError(
            "config must be a SaleConfig, a Calibration or a mapping from layer indices to SaleConfigs, got "
            f"{type(config).__name__}."
        )
    if set(config) != set(heads):
        raise ValueError(
            f"config must name the model's attention layers {sorted(heads)}, each once, got {sorted(config)}; "
            "None makes a layer dense."
        )
    for index, one in config.items():
        if one is not None and not isinstance(one, SaleConfig):
            raise TypeError(f"config[{index}] must be a SaleConfig or None, got {type(one).__name__}.")
    return {index: DENSE_CONFIG if one is None else one for index, one in config.items()}


def _local(config: SaleConfig, heads: int, mine: slice, device: torch.device) -> SaleConfig:
    """The config with the thresholds of this process's heads, on the layer's device."""
    threshold = config.rule.threshold
    if not isinstance(threshold, Tensor):
        return config
    if threshold.shape != (heads,):
        raise ValueError(
            f"config.rule.threshold must be a float or have shape [{heads}], one per query head of the model, got "
            f"{list(threshold.shape)}."
        )
    if threshold.is_meta:
        raise ValueError(
            "config.rule.threshold must have values, got a tensor on the meta device; make it outside of "
            "torch.device('meta')."
        )
    if not threshold.any():
        return replace(config.with_threshold(0.0), min_length=EVERY_ROW)
    with torch.inference_mode(False):  # they serve outside of it too
        return config.with_threshold(threshold[mine].detach().to(device, copy=True))
