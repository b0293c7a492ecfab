# SPDX-License-Identifier: BSD-3-Clause
"""What tells a model's weights from others: hashes that are the same on every device and for every way to load them."""

import ctypes
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Weights = Mapping[str, Mapping[str, str]]
"""Part of a model -> dtype that values were rounded to -> hash."""

_ROUNDED = (torch.bfloat16, torch.float16)
"""One of these hashes is the same for a checkpoint and for what is loaded from it in another dtype, unless both were
loaded from wider values, one in bfloat16 and one in float16."""
_SAMPLE = 2**16
"""Elements of a tensor that are looked at."""


@torch.no_grad()
def fingerprint(model: torch.nn.Module) -> dict[str, dict[str, str]] | None:
    """Hashes of a model's weights: names, shapes and evenly spaced elements of every tensor of a checkpoint.

    Args:
        model: A model of transformers, with its output head or without.

    Returns:
        The hashes of its ``decoder``, which is the part with all attention layers, and of its ``head``, if it has one.
        None where they can not be had: this process has only a share of the weights, or some have no data because they
        are offloaded, or a quantisation keeps them in a tensor type of its own.
    """
    from transformers import PreTrainedModel

    from sale_flex.integrations.transformers.layers import attention_layers

    layers = set(attention_layers(model).values())
    whole = [part for part in model.modules() if isinstance(part, PreTrainedModel) and layers <= set(part.modules())]
    if not whole or any((getattr(part, "_tp_size", None) or 1) > 1 for part in whole):
        return None
    parts = {"decoder": whole[-1]}  # modules come before those inside them
    head = whole[0].get_output_embeddings()
    if head is not None:
        parts["head"] = head
    found = {}
    for name, part in parts.items():
        tensors = dict(_tensors(part))
        if not all(type(tensor.data) is Tensor and not tensor.is_meta for tensor in tensors.values()):
            return None
        found[name] = _hashes(tensors)
    return found


def differing(one: Weights | None, other: Weights | None) -> list[str]:
    """The parts that both have and that have other weights; none where one is not known."""
    if one is None or other is None:
        return []
    return [part for part in one if part in other and not set(one[part].items()) & set(other[part].items())]


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and the buffers that a checkpoint has; of tied ones the first name."""
    yield from module.named_parameters()
    passing = {
        f"{prefix}.{name}" if prefix else name
        for prefix, owner in module.named_modules()
        for name in owner._non_persistent_buffers_set
    }
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name not in passing)


def _hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    digests = {dtype: hashlib.sha256() for dtype in _ROUNDED}
    for name, tensor in sorted(tensors.items()):
        sample = _sample(tensor).cpu()
        for dtype, digest in digests.items():
            digest.update(f"{name} {list(tensor.shape)}\n".encode())
            digest.update(_bytes(sample.to(dtype) if sample.is_floating_point() else sample))
    return {str(dtype).removeprefix("torch."): digest.hexdigest()[:32] for dtype, digest in digests.items()}


def _sample(tensor: Tensor) -> Tensor:
    """Evenly spaced elements, from the first to the last."""
    if tensor.numel() <= _SAMPLE:
        return tensor.flatten()
    at = torch.arange(_SAMPLE, device=tensor.device) * (tensor.numel() - 1) // (_SAMPLE - 1)
    return tensor[torch.unravel_index(at, tensor.shape)]


def _bytes(tensor: Tensor) -> Any:
    tensor = tensor.contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.numel() else b""
