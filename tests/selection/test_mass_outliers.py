# SPDX-License-Identifier: BSD-3-Clause
"""One key far above its neighbours: what the moments of its sub-block make of it, and of all other blocks' shares.

In a sub-block of g keys, let one be x nats above the others for a row q, x > 0, and let no channel of it count against
the others (``q_c d_c >= 0`` for the difference d). The mean logit is x / g above the others. The variance, of channels
that are taken as independent, ``v = sum_c (q_c d_c)^2 (g - 1) / g^2``, is at most ``x^2 (g - 1) / g^2``: one channel
makes that much, and n equal ones an n-th of it. The estimate is ``E = ln g + x / g + min(v / 2, 2 (g - 1))``, and

* from above: ``min(v / 2, 2 (g - 1)) <= sqrt((g - 1) v) <= x (g - 1) / g``, so ``E <= ln g + x``. The exact
  log-sum-exp, ``ln(g - 1 + e^x)``, is at least x. So the sub-block weighs at most g times what it should, a row with
  any number of such sub-blocks at most g times its total, and no other block's share shrinks below a g-th;
* from below: ``E >= ln g + x / g``, and the exact one is at most ``ln g + x``: a needle that is aligned with the row,
  a little of it in every channel, may be seen diluted by up to ``x (1 - 1 / g)`` nats. Where one channel makes it, E is
  ``ln g + x / g + min(x^2 (g - 1) / (2 g^2), 2 (g - 1))``, and it is found.

A key far below its neighbours is another matter: E grows with its variance, and the log-sum-exp does not.
"""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sale_flex import Mass, SaleConfig, reference
from sale_flex.testing import Shape, moment_error_bound, random_inputs
from sale_flex.testing.strategies import seeds

LENGTH, DIM, BLOCK = 640, 64, 64


class Case(NamedTuple):
    """Keys that are equal within sub-blocks, but for needles, and one query for all rows."""

    query: Tensor
    key: Tensor
    needles: dict[int, float]
    """Key index -> nats above its neighbours."""


def make_case(seed: int, sub_block: int, kind: str, needles: dict[int, float]) -> Case:
    query, key, _ = random_inputs(Shape(LENGTH, LENGTH, head_dim=DIM), seed)
    query = query[:, :, :1].expand_as(query).contiguous()
    key = key[:, :, ::sub_block].repeat_interleave(sub_block, 2)
    row = query[0, 0, 0]
    if kind == "one channel":
        channel = int(row.abs().argmax())
        unit = torch.zeros(DIM)
        unit[channel] = 1 / row[channel]
    else:
        unit = row / row.square().sum()
    for at, nats in needles.items():
        key[0, 0, at] += unit * nats * DIM**0.5
    return Case(query, key, needles)


def masses(case: Case, config: SaleConfig, quantised: bool) -> tuple[reference.RowMasses, Tensor]:
    """Estimated and exact masses."""
    options = reference.mass_options(config)
    call = reference.make_call(case.query, case.key, config, dtype=torch.float64)
    return reference.row_masses(call, options, quantised=quantised), reference.exact_masses(call, options)


def config_of(sub_block: int, sink_tokens: int = 0, **options: object) -> SaleConfig:
    return SaleConfig(Mass.fast()).with_options(
        sub_block=sub_block, sink_tokens=sink_tokens, local_tokens=16, min_length=0, smooth_tokens=0, **options
    )


def other_blocks(case: Case, got: reference.RowMasses) -> Tensor:
    """Candidates without a needle, bool ``[1, 1, np, nk]``."""
    without = torch.ones(LENGTH // BLOCK, dtype=torch.bool)
    without[[at // BLOCK for at in case.needles]] = False
    return got.candidate & without


KINDS = st.sampled_from(["one channel", "aligned"])
SIZES = st.sampled_from([4, 8, 16, 32, 64])
# At most one in a sub-block.
PLACES = st.integers(0, LENGTH // BLOCK - 3).map(lambda block: block * BLOCK + 3)
NEEDLES = st.dictionaries(PLACES, st.floats(5, 30), min_size=1, max_size=4)


@given(seeds(), SIZES, KINDS, NEEDLES, st.sampled_from([0, 32]))
def test_no_other_share_shrinks_below_what_a_sub_block_of_keys_allows(seed, sub_block, kind, needles, sink_tokens):
    case = make_case(seed, sub_block, kind, needles)
    got, exact = masses(case, config_of(sub_block, sink_tokens), quantised=False)
    others = other_blocks(case, got)
    assert (got.mass[others] >= exact[others] / sub_block * (1 - 1e-9)).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["one channel", "aligned"])
@pytest.mark.parametrize("nats", [5, 10, 15, 20, 30])
def test_nor_does_it_in_low_bits(bits, kind, nats):
    # 15 nats in one channel are the worst there is for 8 keys: 1.26 nats of the 2.08 that ln 8 allows, without codes.
    for seed in range(3):
        case = make_case(seed, 8, kind, {3: nats, 200: nats, 331: 15})
        got, exact = masses(case, config_of(8, bits=bits), quantised=True)
        others = other_blocks(case, got)
        assert others.sum() > 100
        assert (got.mass[others] >= exact[others] / 8).all()


@pytest.mark.parametrize("nats", [15, 30])
def test_a_sink_among_the_exact_keys_is_exact(nats):
    case = make_case(0, 8, "aligned", {3: nats})
    got, exact = masses(case, config_of(8, sink_tokens=32), quantised=False)
    torch.testing.assert_close(got.mass, exact * got.candidate, rtol=1e-9, atol=0)
    for bits in (4, 8):
        got, _ = masses(case, config_of(8, sink_tokens=32, bits=bits), quantised=True)
        assert (got.mass >= exact * got.candidate / 8).all()


@given(seeds(), SIZES, KINDS, NEEDLES)
def test_a_needle_is_diluted_by_no_more_than_its_neighbours(seed, sub_block, kind, needles):
    case = make_case(seed, sub_block, kind, needles)
    got, exact = masses(case, config_of(sub_block), quantised=False)
    for at, nats in needles.items():
        here = got.candidate[..., at // BLOCK]
        # Compared are sums in units of the exact part: a total has the other needles in it.
        exact_part = (exact * ~got.candidate).sum(-1)
        ratio = got.sums[..., at // BLOCK] / (exact[..., at // BLOCK] / exact_part)
        assert (ratio[here] >= math.exp(-nats * (1 - 1 / sub_block)) * (1 - 1e-9)).all()
        assert (ratio[here] <= sub_block * (1 + 1e-9)).all()


@given(seeds(), SIZES, st.floats(0, 30))
def test_a_needle_in_one_channel_is_seen_with_its_variance(seed, sub_block, nats):
    case = make_case(seed, sub_block, "one channel", {})
    with_needle = make_case(seed, sub_block, "one channel", {131: nats})
    bounds, mean = reference.make_bounds(1, LENGTH, LENGTH), torch.zeros(1, 1, DIM)
    pooled = reference.pool_rows(case.query, bounds, BLOCK, 4)
    before, after = (
        reference.moment_logits(
            pooled,
            *reference.key_moments(x.key, mean, bounds, BLOCK, sub_block, torch.float64),
            sub_block,
            DIM**-0.5,
        )[0, 0, 0, 131 // sub_block]
        for x in (case, with_needle)
    )
    g = sub_block
    expected = nats / g + min(nats**2 * (g - 1) / (2 * g * g), 2 * (g - 1))
    assert float(after - before) == pytest.approx(expected, rel=1e-4, abs=1e-5)  # keys are float32


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sub_block", [4, 8])
@pytest.mark.parametrize("nats", [6, 10, 15, 20, 30])
def test_a_needle_in_one_channel_is_found(bits, sub_block, nats):
    # Among keys that are all alike: the needle's share is e^nats of a few hundred at least.
    for seed in range(3):
        case = make_case(seed, LENGTH, "one channel", {131: nats})
        config = config_of(sub_block, bits=bits, threshold=0.01, pool=4)
        expected = reference.keep_map(case.query, case.key, config)
        asked = expected.visible & ~expected.always
        assert expected.hit[..., 131 // BLOCK][asked[..., 131 // BLOCK]].all()


@given(seeds(), SIZES, KINDS, NEEDLES, st.sampled_from([4, 8]))
def test_codes_move_an_estimate_by_no_more_than_their_bound(seed, sub_block, kind, needles, bits):
    case = make_case(seed, sub_block, kind, needles)
    config = config_of(sub_block, bits=bits)
    options, bounds, mean = (
        reference.mass_options(config),
        reference.make_bounds(1, LENGTH, LENGTH),
        torch.zeros(1, 1, DIM),
    )
    pooled = reference.pool_rows(case.query, bounds, BLOCK, options.pool)
    of_keys = reference.key_moments(case.key, mean, bounds, BLOCK, sub_block, torch.float64)
    codes = reference.quantize_moments(case.key, mean, bounds, BLOCK, sub_block, bits)
    error = moment_error_bound(pooled, *of_keys, codes, DIM**-0.5, bits)
    logits = reference.moment_logits(pooled, *of_keys, sub_block, DIM**-0.5)
    exact, _ = masses(case, config, quantised=False)
    got, _ = masses(case, config, quantised=True)
    logits = logits - exact.unit[..., None] * math.log(2)
    least, most = (x.exp().unflatten(-1, (LENGTH // BLOCK, -1)).sum(-1) for x in (logits - error, logits + error))
    here = exact.candidate
    assert (got.sums[here] >= least[here] * (1 - 1e-6) - 2.0**-100).all()  # values below 2 ** -127 are cut off
    assert (got.sums[here] <= most[here] * (1 + 1e-6)).all()
