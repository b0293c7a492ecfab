# SPDX-License-Identifier: BSD-3-Clause
"""What tests of rules in plain torch share: settled calls, choices beside the reference, and errors of logits."""

from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from sale_flex import Call, Mass, Rule, SaleConfig, create_sale_block_mask, reference
from sale_flex.call.facts import check_arguments, settle
from sale_flex.call.stages import lay_out
from sale_flex.call.user_mods import UserMods
from sale_flex.reference.call import exact_logits
from sale_flex.testing import Inputs, Shape, assert_same_blocks, block_map, gamma, logit_error_bound, structured_inputs
from sale_flex.testing.strategies import configs, shapes

SMALL = SaleConfig(min_length=0, sink_tokens=4, local_tokens=8, smooth_tokens=0)
"""Leaves nearly every block to the rule."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

STEEPEST = 1.5
"""By how much a score_mod of `sale_flex.testing.programs` may move when its logit does."""


@st.composite
def ruled(draw: st.DrawFn, rules: st.SearchStrategy[Rule], **options: Any) -> tuple[Shape, SaleConfig]:
    """A shape, and a config with one of `rules` that leaves most blocks to it, at times with a threshold per head."""
    options = {
        "max_tokens": 500,
        "min_tokens": 200,
        "groups": (1, 2, 3),
        "head_dims": (32,),
        "dtypes": DTYPES,
    } | options
    shape = draw(shapes(**options))
    rule = draw(rules)
    if draw(st.booleans()):
        other = [rule.threshold, *(draw(rules).threshold for _ in range(shape.heads - 1))]
        rule = rule.with_threshold(torch.tensor(other))
    return shape, replace(draw(configs(kinds=(Mass,), max_min_length=0, max_window=24)), rule=rule)


def settled(inputs: Inputs, config: SaleConfig, where: dict[str, Any] | None = None, **mods: Any) -> Call:
    """The facts of a call."""
    where = {"q_offset": None, "kv_range": None} | (where or {})
    given = check_arguments(
        inputs.query, inputs.key, None, config, UserMods(**mods), where["q_offset"], where["kv_range"], None, None
    )
    return settle(given)


def scores(inputs: Inputs, config: SaleConfig, where: dict[str, Any] | None = None, **mods: Any) -> Tensor:
    """What the rule says of every block, ``[B, Hq, nq, nk]``."""
    call = settled(inputs, config, where, **mods)
    return call.rule.scores(call, lay_out(call))


def kept(inputs: Inputs, config: SaleConfig, **options: Any) -> Tensor:
    """The blocks of a call's mask, bool ``[B, Hq, nq, nk]``."""
    return block_map(create_sale_block_mask(inputs.query, inputs.key, config, **options)).kept


def spoiled_inputs(shape: Shape, seed: int, special: float | None) -> Inputs:
    """Structured inputs, one number of the queries and one of the keys replaced, if one is given."""
    inputs = structured_inputs(shape, seed)
    if special is not None:
        inputs.query.view(-1)[seed % inputs.query.numel()] = special
        inputs.key.view(-1)[seed % inputs.key.numel()] = special
    return inputs


def check_choice(
    shape: Shape, inputs: Inputs, config: SaleConfig, within: float, **mods: Any
) -> tuple[reference.KeepMap, int]:
    """Assert that a call keeps the reference's blocks but for some whose margin is `within`, and that few have such.

    Returns:
        What the reference keeps, and how many blocks are decided otherwise.
    """
    expected = reference.keep_map(inputs.query, inputs.key, config, dtype=torch.float64, **mods, **shape.positions())
    differ = assert_same_blocks(kept(inputs, config, **mods, **shape.positions()), expected, within)
    candidate = (expected.visible & ~expected.always).expand_as(expected.kept)
    doubtful = candidate & (expected.margin.abs() <= within)
    assert int(doubtful.sum()) <= 2 + int(candidate.sum()) // 50
    return expected, differ


def logit_error(shape: Shape, inputs: Inputs, config: SaleConfig, **mods: Any) -> float:
    """How far float32 may be from exact logits less their row's maximum, score_mod included, in nats.

    A product's `logit_error_bound` (numbers that are not finite count as 0), as steep as a score_mod may make it; 16
    roundings of the largest logit for the score_mod's own steps and for the maximum.
    """
    query, key = (torch.where(x.isfinite(), x, 0.0) for x in inputs[:2])
    call = reference.make_call(query, key, config, dtype=torch.float64, **mods, **shape.positions())
    row = torch.arange(shape.q_len).expand(shape.batch, -1)
    logits = exact_logits(call, query, row).masked_fill(~call.elements, 0.0)
    products = logit_error_bound(query, key)
    largest = max(float(logits.abs().max()), float(products.max()) / gamma(shape.head_dim + 2))
    return STEEPEST * float(products.max()) + gamma(16) * largest
