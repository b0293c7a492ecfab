# SPDX-License-Identifier: BSD-3-Clause
"""Synthetic queries, keys and values whose attention map looks like a trained model's.

Independent random vectors leave nothing to drop: every block holds an element about as large as any other. Times at a
density and errors of low-bit codes mean something only on tensors that have structure to find.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

SINK, LOCAL, TOPIC, NEEDLE, NOISE = 8.0, 5.0, 6.0, 10.0, 4.0
"""Logits of the parts, see `generate`."""
TOPICS, STRETCH, NEEDLE_EVERY = 32, 1024, 64
"""Topics in all; tokens of a stretch of one topic on average; rows per row that seeks a needle."""
STRETCH_ROWS = 64
"""Rows that look into the same blocks, with turning queries."""
TURNING = 12.0
"""Logit of the key that a turning query seeks."""
OUTLIER_SIZE = (20.0, 50.0)
"""Root mean square of the smallest and the largest outlier channel, over that of the other channels of its head."""
OUTLIER_SPREAD = 8.0
"""Mean of an outlier channel over the standard deviation around it."""


class Generated(NamedTuple):
    """One attention call's tensors, and what was planted in them."""

    query: Tensor
    """``[B, Hq, S, D]``."""
    key: Tensor
    """``[B, Hkv, S, D]``."""
    value: Tensor
    """``[B, Hkv, S, D]``."""
    needles: Tensor
    """int32 ``[B, Hq, S]``: the key that a row seeks, -1 where it seeks none."""
    outliers: Tensor
    """int64 ``[B, Hkv, outliers]``: the outlier channels of each KV head, the largest first."""


def generate(
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    batch: int = 1,
    outliers: int = 0,
    turning: int = 0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Generated:
    """Draw queries, keys and values for a softmax scale of ``head_dim ** -0.5``.

    A logit is a sum of what trained heads show. The parts share out the channels, which a rotation then mixes, one for
    each KV head:

    * a sink: 8 on key 0, from every row;
    * a local decay: 5 at distance 0, a sum of cosines of 16 wavelengths (a quarter of the channels if those are fewer
      than 64) from 6 to 6,000 tokens;
    * diffuse blocks: 6, times 0.6 to 1.4 from the first query head of a group to the last, where the key's stretch of
      text (1,024 tokens on average) has one of 32 topics and the row's stretch has the same one. No key in them stands
      out; together they hold mass;
    * needles: 10 on a single earlier key, from one row in 64; other rows have noise of 4 there.

    With ``outliers=n``, n channels of every KV head get the shape of the outlier channels of large models: a root mean
    square of 20 to 50 times that of the other channels, most of it a mean that all keys share, an eighth of it a
    deviation from key to key. Attention stays what it is without them: such a channel c is ``gain * key + mean`` where
    it was ``key``, and the query's is divided by the gain, so that a logit changes by ``query * mean / gain``, which is
    the same for all keys of a row and leaves the softmax alone. That is a choice: in trained models too the queries are
    small where keys have outliers, but there the mean may turn slowly with the position, by the rotary embedding, and
    here it does not.

    With ``turning=n``, queries and keys are as models with normalised queries have them (Gemma 3, Qwen 3, OLMo 2): all
    of one length, and queries whose direction turns from token to token. Every row, not one in 64, seeks one earlier
    key of its own, with a logit of 12 before rows are brought to one length, somewhere in n blocks of 64 keys that 64
    neighbouring rows share. So a block's rows want the same blocks, which any few of them show; but the mean of a few
    queries seeks none of their keys, and the mean and variance of a few keys show none of them either.

    Args:
        length: Tokens, S.
        heads: Query heads, a multiple of `kv_heads`.
        kv_heads: Key and value heads.
        head_dim: Channels of a head, at least 16.
        batch: Batch rows, each drawn anew.
        outliers: Outlier channels a KV head, at most an eighth of its channels.
        turning: Blocks that turning queries share, 0 for queries that do not turn.
        seed: What to draw from. The same seed gives the same numbers on one kind of device.
        dtype: Of query, key and value, which are computed in float32 and rounded once.
        device: Where they are drawn and stay. Beyond them a head's worth of float32 tensors is held.

    Raises:
        ValueError: A size is outside its range.
    """
    if min(length, heads, kv_heads, batch) < 1 or heads % kv_heads:
        raise ValueError(
            "length, heads, kv_heads and batch must be 1 or more, and heads a multiple of kv_heads, got "
            f"length={length}, heads={heads}, kv_heads={kv_heads}, batch={batch}"
        )
    if head_dim < 16:
        raise ValueError(f"head_dim must be at least 16, to hold all parts, got {head_dim}")
    if not 0 <= outliers <= head_dim // 8:
        raise ValueError(f"outliers must be in [0, {head_dim // 8}], an eighth of the channels, got {outliers}")
    if turning < 0:
        raise ValueError(f"turning must be 0 or a number of blocks, got {turning}")
    query = torch.empty(batch, heads, length, head_dim, dtype=dtype, device=device)
    key = torch.empty(batch, kv_heads, length, head_dim, dtype=dtype, device=device)
    value = torch.empty_like(key)
    needles = torch.empty(batch, heads, length, dtype=torch.int32, device=device)
    channels = torch.empty(batch, kv_heads, outliers, dtype=torch.int64, device=device)
    # Outliers are drawn by themselves, so that all else is the same with and without.
    generator, other = (torch.Generator(device).manual_seed(number) for number in (seed, seed + 1))
    group = heads // kv_heads
    for b in range(batch):
        for kv in range(kv_heads):
            of = slice(kv * group, (kv + 1) * group)
            head = _Head(length, head_dim, generator, turning)
            gain: Tensor | float = 1.0
            if outliers:
                gain, channels[b, kv] = _add_outliers(head.key, outliers, other)
            key[b, kv] = head.key
            for member in range(group):
                rows, needles[b, of][member] = head.query(0.6 + 0.8 * member / max(group - 1, 1))
                query[b, of][member] = rows / gain
            value[b, kv] = torch.randn(length, head_dim, generator=generator, device=device)
    return Generated(query, key, value, needles, channels)


class _Head:
    """One KV head: its keys, float32 ``[S, D]``, and queries that fit them."""

    def __init__(self, length: int, dim: int, generator: torch.Generator, turning: int) -> None:
        device = generator.device
        self._turning = turning
        self._rand = partial(torch.rand, generator=generator, device=device)
        self._randn = partial(torch.randn, generator=generator, device=device)
        waves = min(16, dim // 4)
        topic_dim = (dim - 1 - 2 * waves) // 2
        self._at = torch.arange(length, device=device)
        frequency = torch.logspace(0, -3, waves, device=device)
        turns = [turn(self._at[:, None] * frequency) for turn in (torch.cos, torch.sin)]
        self._wave = torch.cat(turns, 1) / math.sqrt(waves)
        self._rotation = torch.linalg.qr(self._randn(dim, dim))[0]
        stretch = (self._rand(length) < 1 / STRETCH).cumsum(0)
        about = (self._rand(length) * TOPICS).long()[stretch]
        self._topic = normalize(self._randn(TOPICS, topic_dim), dim=1)[about]
        self._identity = normalize(self._randn(length, dim - 1 - 2 * waves - topic_dim), dim=1)
        self.key = torch.cat([(self._at == 0).float()[:, None], self._wave, self._topic, self._identity], 1)
        self.key = self.key @ self._rotation

    def query(self, topic: float) -> tuple[Tensor, Tensor]:
        """Queries float32 ``[S, D]`` that weigh topics by `topic`, and the needles they seek, int64 ``[S]``."""
        length = len(self._at)
        if self._turning:
            target, seeks = self._turning_targets(), torch.ones(length, dtype=torch.bool, device=self._at.device)
        else:
            target = (self._rand(length) * (self._at + 1)).long()
            seeks = self._rand(length) < 1 / NEEDLE_EVERY
        noise = NOISE * normalize(self._randn(self._identity.shape), dim=1)
        strength = TURNING if self._turning else NEEDLE
        wanted = torch.where(seeks[:, None], strength * self._identity[target], noise)
        sink = torch.full((length, 1), SINK, device=wanted.device)
        rows = torch.cat([sink, LOCAL * self._wave, topic * TOPIC * self._topic, wanted], 1) @ self._rotation
        if self._turning:
            rows = normalize(rows, dim=1) * rows.norm(dim=1).mean()
        # The square root undoes the softmax scale.
        return rows * math.sqrt(rows.shape[1]), torch.where(seeks, target, -1)

    def _turning_targets(self) -> Tensor:
        """The key that each row seeks, int64 ``[S]``: in one of the blocks that its stretch shares."""
        stretch = self._at // STRETCH_ROWS
        shared = self._rand(int(stretch[-1]) + 1, self._turning)
        pick = (self._rand(len(self._at)) * self._turning).long()
        block = (shared[stretch, pick] * stretch.clamp_min(1)).long()
        inside = (self._rand(len(self._at)) * STRETCH_ROWS).long()
        return torch.minimum(block * STRETCH_ROWS + inside, self._at)


def _add_outliers(key: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Turn `count` channels of float32 ``[S, D]`` into outliers, in place.

    Returns:
        What the queries' channels are to be divided by, float32 ``[D]``, and the channels, int64 ``[count]``.
    """
    gain = torch.ones(key.shape[1], device=key.device)
    chosen = torch.randperm(key.shape[1], generator=generator, device=key.device)[:count]
    smallest, largest = OUTLIER_SIZE
    usual = key[:, gain.scatter(0, chosen, 0.0).bool()].square().mean().sqrt()
    size = torch.logspace(math.log10(largest), math.log10(smallest), count, device=key.device) * usual
    column = key[:, chosen]
    deviation = column.std(0, correction=0).clamp_min(torch.finfo(torch.float32).tiny)
    gain[chosen] = size / OUTLIER_SPREAD / deviation
    # mean ** 2 + (size / spread) ** 2 = size ** 2
    mean = size * math.sqrt(1 - OUTLIER_SPREAD**-2)
    sign = torch.randint(2, (count,), generator=generator, device=key.device) * 2 - 1
    key[:, chosen] = (column - column.mean(0)) * gain[chosen] + sign * mean
    return gain, chosen
