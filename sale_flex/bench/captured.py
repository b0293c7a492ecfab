# SPDX-License-Identifier: BSD-3-Clause
"""The file that `sale-flex capture` writes and `sale-flex bench --qkv` reads: safetensors with a few fields.

Tensors are ``layerN.query`` ``[1, Hq, S, D]``, ``layerN.key`` and ``layerN.value`` ``[1, Hkv, S, D]``, after position
embedding. The metadata's fields are strings: ``model``, ``length`` in tokens, ``dtype``, and ``scale``, the softmax
scale of all the layers.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sale_flex.bench.plan import DTYPES

NAMES = ("query", "key", "value")
_REMEDY = "capture it again: sale-flex capture"


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
            names = set(file.keys())
            found = sorted(int(match[1]) for name in names if (match := re.fullmatch(r"layer([0-9]+)\.query", name)))
            scale = (file.metadata() or {}).get("scale")
            if not found or scale is None:
                raise ValueError(f"--qkv {path} has no layers or no softmax scale; is it from `sale-flex capture`?")
            layer = found[0] if layer is None else layer
            if layer not in found:
                raise ValueError(f"--layer must be one of those in {path}, {found}, got {layer}")
            missing = [name for name in _names(layer) if name not in names]
            if missing:
                raise ValueError(f"--qkv {path} must hold {' and '.join(missing)} beside the layer's query; {_REMEDY}")
            query, key, value = map(file.get_tensor, _names(layer))
            captured = Captured(query, key, value, _read_scale(scale, path))
    except SafetensorError as error:
        raise ValueError(f"--qkv {path} is not a file of `sale-flex capture`: {error}") from None
    _check_tensors(captured, layer, path)
    return layer, captured


def _names(layer: int) -> list[str]:
    return [f"layer{layer}.{name}" for name in NAMES]


def _read_scale(text: str, path: Path) -> float:
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"--qkv {path}: scale must be a number above 0 in the metadata, got {text!r}; {_REMEDY}")
    return scale


def _check_tensors(captured: Captured, layer: int, path: Path) -> None:
    """Raise ValueError unless the tensors are those of one attention call."""
    query, key, value, _ = captured
    for name, tensor in zip(_names(layer), (query, key, value)):
        if tensor.dim() != 4 or 0 in tensor.shape or str(tensor.dtype).removeprefix("torch.") not in DTYPES:
            raise ValueError(
                f"--qkv {path}: {name} must have shape [batch, heads, tokens, channels], all above 0, and one of the "
                f"dtypes {', '.join(DTYPES)}, got {list(tensor.shape)} and {tensor.dtype}; {_REMEDY}"
            )
    (batch, heads, *rest), (_, kv_heads, *_) = query.shape, key.shape
    fits = key.shape == (batch, kv_heads, *rest) and value.shape[:3] == key.shape[:3] and heads % kv_heads == 0
    if not fits or len({query.dtype, key.dtype, value.dtype}) > 1:
        raise ValueError(
            f"--qkv {path}: layer {layer} must have one batch size, one length, one dtype and a number of query heads "
            f"that its KV heads divide, got query {list(query.shape)}, key {list(key.shape)} and value "
            f"{list(value.shape)} of {query.dtype}, {key.dtype} and {value.dtype}; {_REMEDY}"
        )
