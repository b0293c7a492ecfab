# SPDX-License-Identifier: BSD-3-Clause
"""The file that `sale-flex capture` writes and `sale-flex bench --qkv` reads: safetensors with a few fields.

Tensors are ``layerN.query`` ``[1, Hq, S, D]``, ``layerN.key`` and ``layerN.value`` ``[1, Hkv, S, D]``, after position
embedding. The metadata's fields are strings: ``model``, ``length`` in tokens, ``dtype``, and ``scale``, the softmax
scale of all the layers.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

NAMES = ("query", "key", "value")


class Captured(NamedTuple):
    """What attention got in one layer of a model."""

    query: Tensor
    """``[1, Hq, S, D]``, after position embedding."""
    key: Tensor
    """``[1, Hkv, S, D]``, after position embedding."""
    value: Tensor
    """``[1, Hkv, S, D]``."""
    scale: float
    """Softmax scale."""


def write_captured(path: Path, layers: Mapping[int, Captured], model: str) -> dict[str, str]:
    """Write what `layers` hold, by number, and return the metadata.

    Raises:
        ValueError: The layers do not have one softmax scale.
    """
    scales = {layer: captured.scale for layer, captured in layers.items()}
    if len(set(scales.values())) != 1:
        raise ValueError(f"--layers must share one softmax scale, got {scales}; capture them into files of their own")
    query = next(iter(layers.values())).query
    metadata = {
        "model": model,
        "length": str(query.shape[2]),
        "dtype": str(query.dtype).removeprefix("torch."),
        "scale": repr(next(iter(scales.values()))),
    }
    tensors = {
        f"layer{layer}.{name}": getattr(captured, name).contiguous()
        for layer, captured in layers.items()
        for name in NAMES
    }
    save_file(tensors, path, metadata)
    return metadata


def read_captured(path: Path, layer: int | None = None) -> tuple[int, Captured]:
    """Read one layer's tensors to the CPU.

    Args:
        path: A file of `write_captured`.
        layer: Which; None is the first there is.

    Returns:
        The layer's number and what it holds.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is none of `sale-flex capture`, or holds no such layer; the message names those it has.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--qkv {path} is not a file; `sale-flex capture` writes one")
    try:
        with safe_open(path, framework="pt") as file:
            found = sorted(int(match[1]) for name in file.keys() if (match := re.fullmatch(r"layer(\d+)\.query", name)))  # noqa: SIM118
            scale = (file.metadata() or {}).get("scale")
            if not found or scale is None:
                raise ValueError(f"--qkv {path} has no layers or no softmax scale; is it from `sale-flex capture`?")
            layer = found[0] if layer is None else layer
            if layer not in found:
                raise ValueError(f"--layer must be one of those in {path}, {found}, got {layer}")
            query, key, value = (file.get_tensor(f"layer{layer}.{name}") for name in NAMES)
            return layer, Captured(query, key, value, float(scale))
    except SafetensorError as error:
        raise ValueError(f"--qkv {path} is not a file of `sale-flex capture`: {error}") from None
