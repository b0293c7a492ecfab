# SPDX-License-Identifier: BSD-3-Clause
"""Selection rules: a file each. A rule turns queries and keys into hit bits; the mask builder does the rest."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from sale_flex.config import SaleConfig
from sale_flex.rules import mass, relative
from sale_flex.sight import Lists, Mod, Sight, Structure


class Rule(NamedTuple):
    """A rule in two stages; the second for causal calls and for programmed ones."""

    codes: Callable[..., tuple[Tensor, ...]]
    """``codes(key, bounds, config, every_key=False, reuse=None)``: the smoothing mean, and what the estimate knows of
    the keys. `every_key`: of single keys, whatever the config says. `reuse`: a `sale_flex.key_codes.Reuse`, codes of
    earlier calls' keys."""

    estimate: Callable[
        [Tensor, Tensor, tuple[Tensor, ...], Tensor, bool, Tensor, float, SaleConfig, int],
        tuple[Tensor, Tensor | None],
    ]
    """``estimate(query, key, codes, bounds, from_zero, threshold, scale, config, budget)``.

    Takes query ``[B, Hq, Sq, D]``, key ``[B, Hkv, Skv, D]``, bounds int32 ``[B, 3]``, whether every batch row's first
    valid key is known to be key 0, the threshold float32 ``[Hq]``, the softmax scale, and how many hits a query
    block's list has room for. Returns hit bits int32 ``[B, Hq, nq, ceil(nk / 32)]``, of which those of always-kept and
    of hidden blocks mean nothing, and hits given up for the budget, int32 ``[B, Hq, nq]``; None from a rule that gives
    up none.
    """

    estimate_listed: Callable[
        [Tensor, Tensor, tuple[Tensor, ...], Structure, Lists, Sight, Mod, Tensor, float, SaleConfig, int, bool],
        tuple[Tensor, Tensor | None],
    ]
    """``estimate_listed(query, key, codes, structure, lists, sight, score, threshold, scale, config, budget, every)``.

    The same for a call whose sight is a program's: only listed blocks are looked at, and `score` is its score_mod.
    """


RULES: dict[str, Rule] = {
    "mass": Rule(mass.codes, mass.estimate, mass.estimate_listed),
    "relative": Rule(relative.codes, relative.estimate, relative.estimate_listed),
}
"""`SaleConfig.metric` -> its rule."""
