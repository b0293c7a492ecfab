# SPDX-License-Identifier: BSD-3-Clause
"""`SaleConfig`: every option of the estimate and the selection, with its unit and its range."""

import math
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

BLOCK_SIZES = ((64, 64), (64, 32), (128, 64), (128, 128))
METRICS = ("mass", "relative")
ESTIMATORS = ("moments", "scan")
ON_MISS = ("report", "dense", "ignore")
POOLS = (1, 2, 4, 8, 16)
SUB_BLOCKS = (4, 8, 16, 32, 64)


@dataclass(frozen=True, eq=False)
class SaleConfig:
    """How blocks are estimated and selected. Frozen; `dataclasses.replace` makes a changed copy.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field is outside its range. The message names the field, the rule and the value.
    """

    metric: str = "mass"
    """The selection rule. ``"mass"``: a block is kept when it takes ``threshold`` or more of some pooled row's softmax.
    ``"relative"``: SALE as published (arXiv 2505.24179, section 3), a block is kept when any of its elements reaches
    ``threshold`` relative to the row's sink-local softmax."""

    threshold: float | Tensor = 0.01
    """What a block must reach, 0 or more: a share of a row's probability (mass; 1 and more keep only what is always
    kept) or a ratio of exponentials (relative; 0.004 to 0.032 are usual). A float for all heads, or a float tensor
    ``[Hq]`` on the query's device. Higher keeps less; 0 makes a head dense."""

    estimator: str = "scan"
    """How the mass is estimated, from products of codes. ``"scan"``: of a row with every key, both rotated.
    ``"moments"``: of a row with the mean and the variance of every sub-block of keys, an eighth of the work, and not
    safe on every model (see `fast`). The relative rule has its own scan."""

    query_pool: int = 4
    """Mass, if `query_stride` is None: how many adjacent queries are averaged to one row, in rows: 1, 2, 4, 8 or 16."""

    query_stride: int | None = 4
    """Mass: every so many-th query is scored, alone: 1, 2, 4, 8 or 16. None: `query_pool` queries are averaged."""

    sub_block: int = 8
    """Moments: keys whose mean and variance stand for them, 4, 8, 16, 32 or 64, at most the keys of a block."""

    block_size: tuple[int, int] = (64, 64)
    """(query rows, keys) of a block: (64, 64), (64, 32), (128, 64) or (128, 128)."""

    bits: int = 8
    """Width of the codes: 8 (values in [-127, 127]) or 4 ([-7, 7]). Both travel in int8, so both cost the same time;
    stored codes of earlier chunks' keys (`KeyCodes`) take half the memory in 4 bits."""

    sink_tokens: int = 32
    """How many of the first valid keys count as attention sinks, in tokens, 0 or more. Their blocks are always kept.
    Under a mask, of the first keys that a row sees: a document's own, or a window's."""

    local_tokens: int = 128
    """How many keys, ending at a row's own position, count as local, in tokens, 1 or more. Always kept. Without
    causality as many on either side."""

    min_length: int | None = None
    """Queries fewer than this many keys after the first valid key keep every block, in tokens, 0 or more. A prompt
    that is shorter as a whole is dense, and so are documents and windows that are shorter. None: where the sparse path
    breaks even on the device (`break_even_length`)."""

    smooth_tokens: int = 1024
    """The mean of this many first valid keys is subtracted from all keys before quantisation, in tokens, 0 or more
    (0: no smoothing). A prefix, so that chunks, padding and batches choose the same blocks."""

    max_blocks: int | None = None
    """Mass: room in a query block's index list, in blocks. Where more pass the threshold, those with the largest mass
    are kept and the others counted (`SaleStats.dropped_blocks`). None: all of them on short prompts and for thresholds
    given per head, otherwise what bounds the lists' memory (docs/semantics.md, "Index lists")."""

    on_miss: str = "report"
    """What the audit is for: one row of every 64 to 256 positions is scored exactly, to see what the choice missed
    (`sale_flex.stats.Audit`). ``"report"``: for the stats of who asks for them, and the transformers integration does.
    ``"dense"``: in every call, and a head that missed more than `miss_bound` keeps all its blocks, decided on the
    device; index lists then have room for all. ``"ignore"``: no audit."""

    miss_bound: float = 0.2
    """Share of what audited rows want, in [0, 1], whose loss is too much (`sale_flex.stats.Audit.miss`)."""

    @classmethod
    def fast(cls, threshold: float | Tensor = 0.005, **options: Any) -> Self:
        """The cheapest estimate, for models on which it was measured: moments of 8 keys, 4 queries averaged, 4 bits.

        It chooses blocks in half of the default's time at 32K tokens and a fifth at 128K, and is **not safe on every
        model**: where queries differ from token to token, as those of models that normalise them do, averages and
        moments hide what single keys weigh. On Gemma 3 270M at 32K tokens it raises the loss by 0.058 (the default: by
        nothing). Compare the loss of your model on your text with and without it first.

        Args:
            threshold: As the field; averaged rows are flatter than single ones, and want a lower one.
            options: Other fields.
        """
        chosen = {"estimator": "moments", "query_stride": None, "query_pool": 4, "sub_block": 8, "bits": 4}
        return cls(threshold=threshold, **(chosen | options))

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str):
            raise TypeError(f"metric must be a str, got {type(self.metric).__name__}.")
        if self.metric not in METRICS:
            raise ValueError(f"metric must be one of {METRICS}, got {self.metric!r}.")
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"estimator must be one of {ESTIMATORS}, got {self.estimator!r}.")
        if self.on_miss not in ON_MISS:
            raise ValueError(f"on_miss must be one of {ON_MISS}, got {self.on_miss!r}.")
        if isinstance(self.miss_bound, bool) or not isinstance(self.miss_bound, (int, float)):
            raise TypeError(f"miss_bound must be a float, got {self.miss_bound!r}.")
        if not 0 <= self.miss_bound <= 1:
            raise ValueError(f"miss_bound must be a share in [0, 1], got {self.miss_bound!r}.")
        _check_threshold(self.threshold)
        if tuple(self.block_size) not in BLOCK_SIZES:
            raise ValueError(
                f"block_size must be (query rows, keys), one of {list(BLOCK_SIZES)}, got {self.block_size!r}."
            )
        object.__setattr__(self, "block_size", tuple(self.block_size))
        if self.bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, got {self.bits!r}.")
        self._check_sizes()
        for name, least in (
            ("sink_tokens", 0), ("local_tokens", 1), ("min_length", 0), ("smooth_tokens", 0), ("max_blocks", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is None and name in ("min_length", "max_blocks"):
                continue
            unit = "blocks" if name == "max_blocks" else "tokens"
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int (a number of {unit}), got {value!r}.")
            if value < least:
                raise ValueError(f"{name} must be at least {least} {unit}, got {value}.")

    def _check_sizes(self) -> None:
        if self.query_pool not in POOLS:
            raise ValueError(f"query_pool must be one of {POOLS} rows, got {self.query_pool!r}.")
        if self.query_stride is not None and self.query_stride not in POOLS:
            raise ValueError(f"query_stride must be None or one of {POOLS} rows, got {self.query_stride!r}.")
        if self.sub_block not in SUB_BLOCKS:
            raise ValueError(f"sub_block must be one of {SUB_BLOCKS} keys, got {self.sub_block!r}.")
        if self.sub_block > self.block_size[1]:
            raise ValueError(
                f"sub_block must be at most the {self.block_size[1]} keys of a block, got {self.sub_block}; take a "
                "smaller sub_block or a larger block_size."
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SaleConfig):
            return NotImplemented
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if isinstance(mine, Tensor) or isinstance(theirs, Tensor):
                if not (isinstance(mine, Tensor) and isinstance(theirs, Tensor) and torch.equal(mine, theirs)):
                    return False
            elif mine != theirs:
                return False
        return True

    def __hash__(self) -> int:
        return hash((self.metric, self.estimator, self.block_size, self.bits, self.sink_tokens, self.local_tokens))


def _check_threshold(threshold: float | Tensor) -> None:
    if isinstance(threshold, Tensor):
        if threshold.dim() != 1 or not threshold.is_floating_point():
            raise ValueError(
                "threshold must be a float or a floating-point tensor of shape [Hq], got a tensor of shape "
                f"{list(threshold.shape)} and dtype {threshold.dtype}."
            )
        # Values on an accelerator are not read here: that would stop the host. They are checked where they are used.
        if threshold.device.type == "cpu" and not bool((threshold >= 0).all() & threshold.isfinite().all()):
            raise ValueError(f"threshold must be 0 or more and finite for every head, got {threshold.tolist()}.")
        return
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise TypeError(f"threshold must be a float or a float tensor of shape [Hq], got {type(threshold).__name__}.")
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(f"threshold must be 0 or more and finite, got {threshold!r}.")
