# SPDX-License-Identifier: BSD-3-Clause
"""A model's attention modules, told apart: its own sequence's, a decoder's cross-attention, and an encoder's beside it.

Modules of all three count their layers from 0, so that a layer index alone names none of them.
"""

from collections import Counter
from typing import NamedTuple

import torch

from sale_flex.integrations.transformers.refused import refuse


class Towers(NamedTuple):
    """The attention modules of a model."""

    layers: dict[int, torch.nn.Module]
    """Layer index -> the module that is configured, ascending."""
    cross: dict[int, list[torch.nn.Module]]
    """Layer index -> the same decoder layer's cross-attention, if it has any."""
    encoder: list[torch.nn.Module]
    """Modules of an encoder beside the decoder that `layers` is."""


class _Found(NamedTuple):
    name: str
    layer: int
    module: torch.nn.Module

    @property
    def place(self) -> str:
        """Path of the layer: up to the last number in the name."""
        parts = self.name.split(".")
        last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
        return ".".join(parts[: last + 1])

    @property
    def causal(self) -> bool:
        return bool(self.module.is_causal)


def towers_of(model: torch.nn.Module) -> Towers:
    """Tell a model's attention modules apart.

    Where a layer has a causal module and others of the same index, those are its cross-attention. Where indices of a
    model with ``config.is_encoder_decoder`` occur twice, its causal modules are the decoder and the others the encoder.

    Raises:
        UnsupportedModelError: The model, or a part of it with attention, is refused.
        ValueError: There are no attention modules, or two with the same index.
    """
    config = getattr(model, "config", None)
    refuse(config)
    two = bool(getattr(config, "is_encoder_decoder", False))
    found, encoder = [], []
    for name, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int):
            refuse(getattr(module, "config", None))
            if hasattr(module, "is_causal"):
                found.append(_Found(name, index, module))
        elif two and getattr(module, "is_causal", None) is False:
            encoder.append(module)  # encoders need no index of a cache, and some have none
    if not found:
        raise ValueError(
            "model must have attention modules of transformers, with a layer_idx and is_causal, but "
            f"{type(model).__name__} has none."
        )
    decoding = {(one.place, one.layer) for one in found if one.causal}
    crossed = [one for one in found if not one.causal and (one.place, one.layer) in decoding]
    own = [one for one in found if one.causal or (one.place, one.layer) not in decoding]
    if two and _twice(own) is not None:
        encoder += [one.module for one in own if not one.causal]
        own = [one for one in own if one.causal]
    second = _twice(own)
    if second is not None:
        raise ValueError(
            f"model must have one attention module per layer index, but {second.name!r} is the second with index "
            f"{second.layer}; pass the part that is to be sparse, such as model.model.language_model."
        )
    cross: dict[int, list[torch.nn.Module]] = {}
    for one in crossed:
        cross.setdefault(one.layer, []).append(one.module)
    layers = {one.layer: one.module for one in sorted(own, key=lambda one: one.layer)}
    return Towers(layers, cross, encoder)


def _twice(found: list[_Found]) -> _Found | None:
    """The first whose index was there already."""
    seen: Counter[int] = Counter()
    for one in found:
        seen[one.layer] += 1
        if seen[one.layer] > 1:
            return one
    return None
