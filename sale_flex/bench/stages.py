# SPDX-License-Identifier: BSD-3-Clause
"""`sale_attention` taken apart: each stage on the results of those before it, and the whole."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from sale_flex import ops
from sale_flex.attention import dense_sdpa, sale_attention
from sale_flex.bench.inputs import Inputs
from sale_flex.call.break_even import rows_of_dense_blocks
from sale_flex.call.facts import check_arguments, settle
from sale_flex.call.stages import Choice, Listed, build, list_blocks
from sale_flex.call.user_mods import UserMods
from sale_flex.config import SaleConfig
from sale_flex.flex.run import run_flex

STAGES = ("codes", "estimate", "compact", "flex", "early rows")
"""What `sale_attention` is made of, in order. Early rows are dense."""
MASK, WHOLE = "block mask", "sale_attention"
"""The first three stages in one call, and everything in one call."""
ORDER = (*STAGES[:3], MASK, *STAGES[3:], WHOLE)
"""Every candidate of ours, in the order in which a round runs them."""


def whole_call(inputs: Inputs, config: SaleConfig) -> Callable[..., Any]:
    """`sale_attention` on the inputs; further options may be given when it is called."""
    return partial(sale_attention, *inputs[:3], config, scale=inputs.scale)


class Stages:
    """The candidates of one call. Codes and hits are held; index lists only from `MASK` to the end of ``flex``."""

    def __init__(self, inputs: Inputs, config: SaleConfig) -> None:
        self._inputs, self._config = inputs, config
        query, key, value, scale = inputs
        given = check_arguments(query, key, value, config, UserMods(), None, None, scale, None)
        self.early = rows_of_dense_blocks(given.dense_prefix, config.block_size[0], query.shape[2])
        """How many first rows `sale_attention` leaves to scaled_dot_product_attention; not in `mask`."""
        self._settle = partial(settle, given, lookup=False, rows_apart=self.early)
        self._call = self._settle()
        self._codes = partial(config.rule.codes, self._call)
        self._estimate = partial(config.rule.select, self._call, self._codes(), None)
        self._hits = self._estimate()
        self.mask: BlockMask | None = None
        """What `MASK` has built and ``flex`` takes, once: two masks of a long call need not fit into memory."""

    def runs(self) -> dict[str, Callable[[], Any]]:
        """The candidates by name, in `ORDER`."""
        calls: dict[str, Callable[[], Any]] = {
            "codes": self._codes,
            "estimate": self._estimate,
            "compact": self._compact,
            MASK: self.build_mask,
            "flex": self.attend,
            "early rows": self._attend_early,
            WHOLE: whole_call(self._inputs, self._config),
        }
        return {name: calls[name] for name in ORDER if name != "early rows" or self.early}

    def _compact(self) -> Listed:
        call = self._call
        nonfinite = ops.nonfinite_blocks(self._inputs.value, call.bounds, call.grid.block_k)
        return list_blocks(call, None, Choice(self._hits, nonfinite, None))

    def build_mask(self) -> None:
        """The block mask as `sale_attention` builds it, without a lookup in its mask_mod; into `mask`."""
        self.mask = None
        self.mask = build(self._settle()).block_mask

    def attend(self) -> Tensor:
        """Attention on `mask`, which is given up, ``[B, Hq, S, D]``."""
        query, key, value, scale = self._inputs
        assert self.mask is not None, f"{MASK!r} comes first"
        mask, self.mask = self.mask, None
        return run_flex(query, key, value, mask, scale)[0]

    def _attend_early(self) -> Tensor:
        query, key, value = (x[:, :, : self.early] for x in self._inputs[:3])
        return dense_sdpa(query, key, value, None, self._inputs.scale)
