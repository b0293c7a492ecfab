# SPDX-License-Identifier: BSD-3-Clause
"""The texts of a calibration, as the model reads them."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """A batch of sequences: one text."""

    input_ids: Tensor
    """int64 ``[B, S]``."""
    attention_mask: Tensor | None
    """int64 ``[B, S]``: 0 for padding."""

    @property
    def shape(self) -> tuple[int, int]:
        """Batch rows and tokens."""
        return self.input_ids.shape[0], self.input_ids.shape[1]

    @property
    def sha256(self) -> str:
        """What tells the text from others."""
        digest = hashlib.sha256(repr(self.shape).encode())
        for tensor in self:
            if tensor is not None:
                digest.update(bytes(tensor.cpu().contiguous().view(torch.uint8).flatten().tolist()))
        return digest.hexdigest()

    def to(self, device: torch.device) -> "Tokens":
        """The same on another device."""
        mask = self.attention_mask
        return Tokens(self.input_ids.to(device), None if mask is None else mask.to(device))

    def targets(self) -> Tensor:
        """Tokens that are predicted, int64 ``[B, S - 1]``; -100 where one, or the one before it, is padding."""
        targets = self.input_ids[:, 1:]
        if self.attention_mask is None:
            return targets
        seen = self.attention_mask != 0
        return targets.masked_fill(~(seen[:, 1:] & seen[:, :-1]), -100)


def as_texts(batches: Iterable[Any], name: str = "batches") -> list[Tokens]:
    """Read what the user gave.

    Args:
        batches: Tensors ``[B, S]`` of token ids, or mappings with ``input_ids`` and perhaps ``attention_mask``.
        name: Of the argument.

    Raises:
        TypeError, ValueError: A batch is none of these, or there is none; the message says which.
    """
    if isinstance(batches, (Tensor, Mapping)):
        raise TypeError(f"{name} must be an iterable of batches, got a single one; put it into a list.")
    texts = [_as_text(batch, f"{name}[{n}]") for n, batch in enumerate(batches)]
    if not texts:
        raise ValueError(f"{name} must hold one batch or more, got none.")
    return texts


def _as_text(batch: Any, name: str) -> Tokens:
    mask = None
    if isinstance(batch, Mapping):
        if "input_ids" not in batch or set(batch) - {"input_ids", "attention_mask"}:
            raise ValueError(
                f"{name} must hold input_ids and, at most, an attention_mask, got {sorted(batch)}; leave out the rest."
            )
        batch, mask = batch["input_ids"], batch.get("attention_mask")
    for tensor, what in ((batch, name), (mask, f"{name}'s attention_mask")):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{what} must be a tensor [batch, tokens], got {type(tensor).__name__}.")
        if tensor.dim() != 2 or tensor.is_floating_point() or tensor.shape[0] < 1 or tensor.shape[1] < 2:
            raise ValueError(
                f"{what} must hold integers and have shape [batch, tokens] with two tokens or more, got shape "
                f"{list(tensor.shape)} and dtype {tensor.dtype}; a single sequence needs unsqueeze(0)."
            )
    if mask is not None and mask.shape != batch.shape:
        raise ValueError(
            f"{name}'s attention_mask must have its input_ids' shape {list(batch.shape)}, got {list(mask.shape)}."
        )
    text = Tokens(batch.long(), None if mask is None else mask.long())
    if not bool((text.targets() != -100).any()):
        raise ValueError(f"{name} must have two tokens that are no padding in some row, got none.")
    return text
