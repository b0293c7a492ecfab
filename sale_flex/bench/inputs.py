# SPDX-License-Identifier: BSD-3-Clause
"""Where a benchmark's tensors come from: the generator, or a file of `sale-flex capture`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sale_flex.bench.generator import generate


class Inputs(NamedTuple):
    """One attention call's tensors, on the device."""

    query: Tensor
    """``[B, Hq, S, D]``."""
    key: Tensor
    """``[B, Hkv, S, D]``."""
    value: Tensor
    """``[B, Hkv, S, D]``."""
    scale: float
    """Softmax scale."""


@dataclass(frozen=True)
class Synthetic:
    """Tensors from `generate`."""

    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    outliers: int
    seed: int
    dtype: torch.dtype

    longest: ClassVar[int | None] = None
    """Any length can be drawn."""

    def fields(self) -> dict[str, Any]:
        """What a row says about its inputs."""
        return {
            "inputs": "synthetic",
            "batch": self.batch,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "dtype": str(self.dtype).removeprefix("torch."),
            "outliers": self.outliers,
            "seed": self.seed,
        }

    def load(self, length: int, device: torch.device) -> Inputs:
        """Draw `length` tokens on the device."""
        made = generate(
            length,
            self.heads,
            self.kv_heads,
            self.head_dim,
            batch=self.batch,
            outliers=self.outliers,
            seed=self.seed,
            dtype=self.dtype,
            device=device,
        )
        return Inputs(made.query, made.key, made.value, self.head_dim**-0.5)


class FromFile:
    """The first tokens of one layer of a captured file."""

    def __init__(self, path: Path, layer: int | None, dtype: torch.dtype | None) -> None:
        from sale_flex.bench.captured import read_captured  # here: it needs safetensors

        self._path = path
        self._layer, self._captured = read_captured(path, layer)
        self._dtype = self._captured.query.dtype if dtype is None else dtype

    @property
    def longest(self) -> int:
        """How many tokens the file holds."""
        return self._captured.query.shape[2]

    def fields(self) -> dict[str, Any]:
        """What a row says about its inputs."""
        batch, heads, _, head_dim = self._captured.query.shape
        return {
            "inputs": f"{self._path}, layer {self._layer}",
            "batch": batch,
            "heads": heads,
            "kv_heads": self._captured.key.shape[1],
            "head_dim": head_dim,
            "dtype": str(self._dtype).removeprefix("torch."),
            "outliers": None,
            "seed": None,
        }

    def load(self, length: int, device: torch.device) -> Inputs:
        """Cut `length` tokens and move them to the device."""
        *tensors, scale = self._captured
        query, key, value = (x[:, :, :length].to(device, self._dtype).contiguous() for x in tensors)
        return Inputs(query, key, value, scale)
