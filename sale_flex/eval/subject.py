# SPDX-License-Identifier: BSD-3-Clause
"""A model under one rule after another: losses, what its layers kept, and how long a prefill took."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sale_flex.calibration.model import prepared, token_losses
from sale_flex.calibration.texts import Tokens
from sale_flex.config import SaleConfig

DENSE = "dense"
"""The label of dense attention, which every figure stands beside."""

_NEVER = 2**30
"""A `min_length` below which every prompt is: dense."""


@dataclass(frozen=True, eq=False)
class Measured:
    """One sequence under one rule."""

    losses: Tensor
    """Of every predicted token in nats, float32 ``[targets]`` on the CPU."""
    density: list[list[float]]
    """Kept over visible blocks of every layer and head; of layers that chose blocks."""
    miss: float | None
    """Of the head that missed most, as the audit has it (`sale_flex.stats.Audit.miss`); None where nobody was asked."""
    paths: dict[str, int]
    """How often what ran, in words."""
    seconds: float
    """Of the prefill, without logits."""


class Subject:
    """A model whose attention is sale_flex's, between `running` and its end."""

    def __init__(self, model: Any) -> None:
        self._model = model

    @classmethod
    @contextmanager
    def running(cls, model: Any) -> Iterator["Subject"]:
        """Let a model run sale_flex's attention, and leave it as it was.

        Raises:
            NotImplementedError, TypeError, ValueError: It can not; the message says why.
        """
        with prepared(model):
            yield cls(model)

    @torch.no_grad()
    def measure(self, text: Tokens, config: SaleConfig | None) -> Measured:
        """Run a sequence.

        Args:
            text: The sequence.
            config: The rule; None is dense attention.

        Raises:
            ValueError: The model does not take the config.
        """
        from sale_flex.integrations import transformers as sale_hf

        model, text = self._model, text.to(self._model.device)
        sale_hf.configure(model, SaleConfig(min_length=_NEVER) if config is None else config)
        _wait(model.device)
        began = time.perf_counter()
        output = model.base_model(input_ids=text.input_ids, attention_mask=text.attention_mask, use_cache=False)
        _wait(model.device)
        seconds = time.perf_counter() - began
        losses = token_losses(model, output, text)
        seen = sale_hf.stats(model)
        chose = [layer for layer in seen.layers if layer.sparse_calls]
        paths: dict[str, int] = {}
        for layer in seen.layers:
            for path, count in layer.paths.items():
                paths[path] = paths.get(path, 0) + count
        audited = any(layer.audited_rows for layer in chose)
        return Measured(
            losses, [list(layer.density) for layer in chose], seen.miss if audited else None, paths, seconds
        )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
