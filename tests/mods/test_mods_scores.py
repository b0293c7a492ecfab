# SPDX-License-Identifier: BSD-3-Clause
"""The ready scores, against their formulas key by key."""

import math

import pytest
import torch

from sale_flex.mods import alibi, bucketed_bias, relative_bias, softcap

HEADS, Q_LEN, KV_LEN = 3, 9, 14
OFFSETS = [0, 5, -4, torch.tensor(5)]


def scores(dtype=torch.float32):
    return torch.randn(2, HEADS, Q_LEN, KV_LEN, generator=torch.Generator().manual_seed(0), dtype=dtype) * 4


def applied(score_mod, score):
    """The score mod on ``[B, H, M, N]`` scores, by vmap over one index after the other, as torch evaluates it."""
    sizes = score.shape
    for place in (3, 2, 1, 0):
        dims = [None] * 4
        dims[place] = 0
        score_mod = torch.vmap(score_mod, in_dims=(0, *dims))
    return score_mod(score, *(torch.arange(size) for size in sizes))


def added(score, bias_of, offset):
    """`score` plus ``bias_of(h, distance)``, the distance positive for keys before the row."""
    bias = [
        [[bias_of(h, row + int(offset) - key) for key in range(KV_LEN)] for row in range(Q_LEN)] for h in range(HEADS)
    ]
    return score + torch.tensor(bias)


@pytest.mark.parametrize("offset", OFFSETS, ids=str)
def test_alibi(offset):
    slopes = torch.tensor([0.5, 0.125, 2.0])
    # Exact: slopes are powers of two and distances small.
    assert applied(alibi(slopes, offset), scores()).equal(
        added(scores(), lambda h, distance: -float(slopes[h]) * distance, offset)
    )


@pytest.mark.parametrize(
    ("heads", "exponents"),
    [
        (1, [-8]),
        (8, [-1, -2, -3, -4, -5, -6, -7, -8]),
        (12, [-1, -2, -3, -4, -5, -6, -7, -8, -0.5, -1.5, -2.5, -3.5]),
        (6, [-2, -4, -6, -8, -1, -3]),
    ],
)
def test_alibi_for_a_number_of_heads(heads, exponents):
    score = alibi(heads)
    h = torch.arange(heads)
    zero = torch.zeros(heads, dtype=torch.int32)
    slopes = score(torch.zeros(heads), zero, h, zero, zero + 1)
    # exp2 of libraries is within two units in the last place.
    torch.testing.assert_close(slopes, torch.tensor([2.0**n for n in exponents]), rtol=2**-22, atol=0)


@pytest.mark.parametrize("cap", [2, 0.7, 50.0])
def test_softcap(cap):
    score = scores(torch.float64)
    expected = torch.tensor([cap * math.tanh(x / cap) for x in score.flatten().tolist()], dtype=torch.float64)
    torch.testing.assert_close(applied(softcap(cap), score).flatten(), expected, rtol=2**-48, atol=0)


@pytest.mark.parametrize("offset", OFFSETS, ids=str)
@pytest.mark.parametrize(("columns", "center"), [(4, 0), (7, 3), (5, 4), (1, 0)])
def test_relative_bias(columns, center, offset):
    table = torch.randn(HEADS, columns, generator=torch.Generator().manual_seed(1))

    def bias_of(h, distance):
        return float(table[h, min(max(distance + center, 0), columns - 1)])

    got = applied(relative_bias(table, offset, center=center), scores())
    assert got.equal(added(scores(), bias_of, offset))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (4, 5)])
def test_bucketed_bias_has_the_buckets_of_t5(bidirectional, buckets, max_distance):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    # Distances far beyond the last bucket on both sides; a bucket's bias is its number.
    row, key = torch.arange(300)[:, None], torch.arange(300)
    numbers = torch.arange(buckets, dtype=torch.float32).expand(2, buckets)
    score = bucketed_bias(numbers, max_distance=max_distance, bidirectional=bidirectional)
    got = score(torch.zeros(300, 300), torch.tensor(0), torch.tensor(1), row, key)
    expected = t5.T5Attention._relative_position_bucket(key - row, bidirectional, buckets, max_distance)
    assert got.equal(expected.float())


def test_tables_are_used_in_float32():
    table = torch.randn(HEADS, 4, dtype=torch.float64)
    for biased in (relative_bias(table), relative_bias(table.bfloat16()), alibi(table[:, 0]), bucketed_bias(table)):
        assert applied(biased, scores()).dtype == torch.float32


def test_rough_is_said_where_the_formula_does_not_tell():
    table = torch.zeros(HEADS, 4)
    assert relative_bias(table).rough is False
    assert relative_bias(table, rough=True).rough is True
    assert bucketed_bias(table).rough is False


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: alibi(0), ValueError, r"slopes \(a number of heads, or a tensor\) must be .* at least 1, got 0"),
        (lambda: alibi([0.5]), TypeError, "slopes .* got list"),
        (
            lambda: alibi(torch.arange(4)),
            TypeError,
            r"slopes must be a floating-point tensor, got dtype .* slopes.float\(\)",
        ),
        (
            lambda: alibi(torch.zeros(2, 3)),
            ValueError,
            r"slopes must be a tensor \[heads\], not empty, got shape \[2, 3\]",
        ),
        (
            lambda: alibi(torch.zeros(2), device="cpu"),
            ValueError,
            r"device must be None where slopes is a tensor, got cpu",
        ),
        (lambda: softcap(0.0), ValueError, "cap must be finite and above 0, got 0.0"),
        (lambda: softcap(math.inf), ValueError, "cap must be finite and above 0, got inf"),
        (lambda: softcap("50"), TypeError, "cap must be a float above 0, got str"),
        (
            lambda: relative_bias([1.0]),
            TypeError,
            r"table must be a floating-point tensor \[heads, distances\], got list",
        ),
        (lambda: relative_bias(torch.zeros(4)), ValueError, r"table .* got shape \[4\]"),
        (lambda: relative_bias(torch.zeros(2, 4), center=4), ValueError, "center must be .* from 0 to 3, got 4"),
        (lambda: relative_bias(torch.zeros(2, 4), center=1.0), TypeError, "center must be an int, got float"),
        (
            lambda: bucketed_bias(torch.zeros(2, 1)),
            ValueError,
            r"table must have at least 2 buckets, got shape \[2, 1\]",
        ),
        (lambda: bucketed_bias(torch.zeros(2, 7), bidirectional=True), ValueError, "table must have an even number"),
        (
            lambda: bucketed_bias(torch.zeros(2, 32), max_distance=16),
            ValueError,
            "max_distance must be above 16, .* got 16",
        ),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
