# SPDX-License-Identifier: BSD-3-Clause
"""Queries, keys and values to test attention with: plain noise, realistic structure, planted needles.

Everything is drawn on the CPU from a seed and then moved and rounded, so a seed means the same numbers on every device.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, repr=False)
class Shape:
    """Everything about one attention call but the numbers: sizes, dtype, and where the queries stand."""

    q_len: int
    """Query rows, Sq."""
    kv_len: int
    """Keys, Skv."""
    batch: int = 1
    """Batch rows, B."""
    heads: int = 1
    """Query heads, Hq, a multiple of `kv_heads`."""
    kv_heads: int = 1
    """Key and value heads, Hkv."""
    head_dim: int = 64
    """Channels of a head, D."""
    dtype: torch.dtype = torch.float32
    """Of query, key and value."""
    q_offset: int | None = None
    """Key index of the first query; None for the bottom-right alignment, ``kv_len - q_len``."""
    kv_range: tuple[tuple[int, int], ...] | None = None
    """First and one-past-last valid key of every batch row; None for all keys."""

    def __repr__(self) -> str:
        special = (f"{x.name}={getattr(self, x.name)}" for x in fields(self) if getattr(self, x.name) != x.default)
        return f"Shape({', '.join(special)})"

    @property
    def offset(self) -> int:
        """Key index of the first query."""
        return self.kv_len - self.q_len if self.q_offset is None else self.q_offset

    def valid(self, batch: int) -> tuple[int, int]:
        """First and one-past-last valid key of a batch row."""
        return (0, self.kv_len) if self.kv_range is None else self.kv_range[batch]

    def positions(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """``q_offset`` and ``kv_range`` as sale_flex takes them, the latter int32 ``[B, 2]`` or None."""
        ranges = self.kv_range
        kv_range = None if ranges is None else torch.tensor(ranges, dtype=torch.int32, device=device)
        return {"q_offset": self.q_offset, "kv_range": kv_range}


class Inputs(NamedTuple):
    """One attention call's tensors."""

    query: Tensor
    """``[B, Hq, Sq, D]``."""
    key: Tensor
    """``[B, Hkv, Skv, D]``."""
    value: Tensor
    """``[B, Hkv, Skv, D]``."""


def random_inputs(shape: Shape, seed: int = 0, *, amplitude: float = 1.0, device: torch.device | str = "cpu") -> Inputs:
    """Independent normal numbers: logits of deviation ``amplitude ** 2`` and attention spread over everything.

    Args:
        shape: Sizes and dtype of the result.
        seed: What to draw from.
        amplitude: Standard deviation of queries and keys; values have 1.
        device: Where the result goes.
    """
    query, key, value = _normals(shape, seed)
    return _finish((query * amplitude, key * amplitude, value), shape, device)


def grid_inputs(shape: Shape, seed: int = 0, *, step: float = 0.25, device: torch.device | str = "cpu") -> Inputs:
    """Multiples of `step` in [-2, 2]: sums and products that float32 holds exactly, whatever their order.

    With a `step` of a quarter, a dot product over 256 channels is a multiple of 1/16 below 1024: 14 bits.
    """
    query, key, value = (x.clamp(-2, 2).div(step).round().mul(step) for x in _normals(shape, seed))
    return _finish((query, key, value), shape, device)


def structured_inputs(
    shape: Shape,
    seed: int = 0,
    *,
    sink: float = 4.0,
    local: float = 1.0,
    topic: float = 4.0,
    noise: float = 0.5,
    segment: int = 48,
    device: torch.device | str = "cpu",
) -> Inputs:
    """The pattern of trained models: a sink, neighbours that matter, and passages that refer back to earlier ones.

    Each part adds to the logits what its argument says, through directions of its own in a random basis per KV head, so
    no channel stands for anything. Attention concentrates: with 64-token blocks and a threshold of 0.1, SALE keeps less
    than half of the blocks it sees of 1024 tokens. Logits stay moderate: their float32 errors are far below 1e-5.

    Args:
        shape: Sizes, dtype and valid keys of the result; structure counts from the first valid key.
        seed: What to draw from.
        sink: Logit of the first four valid keys, for every query.
        local: Logit of each of three rotary frequencies (periods of 40, 400 and 4000 tokens) at distance 0.
        topic: Logit between tokens of passages about the same of 16 topics.
        noise: Standard deviation of the noise in every channel; that of the logits is its square.
        segment: Tokens of a passage.
        device: Where the result goes.
    """
    query, key, value = _normals(shape, seed)
    query, key = query * noise, key * noise
    generator = torch.Generator().manual_seed(seed + 1)
    group = shape.heads // shape.kv_heads
    # A logit is q . k / sqrt(D): a direction that both sides hold with this gain contributes its argument.
    gain = shape.head_dim**0.25
    for b in range(shape.batch):
        start, _ = shape.valid(b)
        key_at = torch.arange(shape.kv_len) - start
        query_at = torch.arange(shape.q_len) + shape.offset - start
        for kv_head in range(shape.kv_heads):
            basis, _ = torch.linalg.qr(torch.randn(shape.head_dim, shape.head_dim, generator=generator))
            topics = torch.randint(16, (2 + shape.kv_len // segment,), generator=generator)
            heads = slice(kv_head * group, (kv_head + 1) * group)
            for amplitude, of_key, of_query in (
                (sink, ((key_at >= 0) & (key_at < 4)).float()[:, None], torch.ones(shape.q_len, 1)),
                (local, _rotary_features(key_at), _rotary_features(query_at)),
                (topic, _topic_features(key_at, topics, segment), _topic_features(query_at, topics, segment)),
            ):
                directions, basis = basis[: of_key.shape[1]], basis[of_key.shape[1] :]
                key[b, kv_head] += of_key @ directions * (gain * amplitude**0.5)
                query[b, heads] += of_query @ directions * (gain * amplitude**0.5)
    return _finish((query, key, value), shape, device)


def plant_needle(
    inputs: Inputs,
    *,
    query: int,
    key: int,
    logit: float,
    head: int = 0,
    batch: int = 0,
    scale: float | None = None,
    seed: int = 0,
) -> Inputs:
    """Make one query look for one key: both rows are replaced, and their logit becomes `logit`.

    The two rows are the same random signs times one magnitude: other keys have a logit of 0 with that query on average,
    and symmetric codes of either row alone are exact.

    Args:
        inputs: What to plant in; it is not changed.
        query: Row index of the query.
        key: Index of the key.
        logit: ``scale * q . k`` after planting, in exact arithmetic; a rounding to 16 bits moves it a little.
        head: Query head; its KV head gets the key, which all query heads of the group then see.
        batch: Batch row.
        scale: Softmax scale; by default ``D ** -0.5``.
        seed: What the signs are drawn from.

    Returns:
        New inputs that share the value tensor.
    """
    dim = inputs.query.shape[3]
    scale = dim**-0.5 if scale is None else scale
    signs = torch.randint(2, (dim,), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    row = (signs * (logit / (scale * dim)) ** 0.5).to(inputs.query)
    new_query, new_key = inputs.query.clone(), inputs.key.clone()
    new_query[batch, head, query] = row
    new_key[batch, head // (inputs.query.shape[1] // inputs.key.shape[1]), key] = row
    return Inputs(new_query, new_key, inputs.value)


def _normals(shape: Shape, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((shape.heads, shape.q_len), (shape.kv_heads, shape.kv_len), (shape.kv_heads, shape.kv_len))
    return [torch.randn(shape.batch, *size, shape.head_dim, generator=generator) for size in sizes]


def _finish(tensors: Iterable[Tensor], shape: Shape, device: torch.device | str) -> Inputs:
    return Inputs(*(x.to(device=device, dtype=shape.dtype) for x in tensors))


def _rotary_features(at: Tensor) -> Tensor:
    angle = at[:, None] * (2 * torch.pi / torch.tensor([40.0, 400.0, 4000.0]))
    return torch.cat([angle.cos(), angle.sin()], 1)


def _topic_features(at: Tensor, topics: Tensor, segment: int) -> Tensor:
    return torch.nn.functional.one_hot(topics[(at // segment).clamp(0, len(topics) - 1)], 16).float()
