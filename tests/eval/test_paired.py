# SPDX-License-Identifier: BSD-3-Clause
"""Rises beside dense attention, and how sure they are."""

import pytest
import torch

from sale_flex.eval.paired import SEGMENT, rise_of, segment_sums


def losses(seed: int, count: int, shift: float = 0.0, spread: float = 0.5) -> torch.Tensor:
    return shift + spread * torch.randn(count, generator=torch.Generator().manual_seed(seed))


def rise(sparse: list[torch.Tensor], dense: list[torch.Tensor]):
    return rise_of([segment_sums(x) for x in sparse], [segment_sums(x) for x in dense], [len(x) for x in sparse])


def test_the_mean_is_over_tokens_of_all_sequences():
    dense = [losses(0, 1000), losses(1, 300)]
    sparse = [dense[0] + 0.1, dense[1] - 0.2]
    assert rise(sparse, dense).mean == pytest.approx((1000 * 0.1 - 300 * 0.2) / 1300, abs=1e-6)


def test_an_interval_of_equal_rises_is_a_point_and_of_noise_holds_zero():
    dense = [losses(0, 4 * SEGMENT)]
    point = rise([dense[0] + 0.25], dense)
    assert (point.low, point.high) == pytest.approx((0.25, 0.25), abs=1e-6)
    noise = rise([dense[0] + losses(1, 4 * SEGMENT)], dense)
    assert noise.low < 0 < noise.high
    assert noise.low <= noise.mean <= noise.high


def test_an_interval_holds_the_truth_as_often_as_it_says():
    # 32 segments and a normal rise: at 95 % confidence 200 draws miss 10 times, and 25 times less often than in 1e-5.
    truth, count = 0.03, 32 * SEGMENT
    missed = 0
    for seed in range(200):
        found = rise([losses(seed, count, truth)], [torch.zeros(count)])
        missed += not found.low <= truth <= found.high
    assert 1 <= missed <= 25


def test_more_text_narrows_it():
    wide, narrow = (rise([losses(3, n * SEGMENT)], [torch.zeros(n * SEGMENT)]) for n in (8, 128))
    assert narrow.high - narrow.low < 0.5 * (wide.high - wide.low)


def test_other_tokens_are_refused():
    with pytest.raises(ValueError, match="the same tokens"):
        rise_of([[1.0, 2.0]], [[1.0]], [SEGMENT + 1])
    with pytest.raises(ValueError, match="one sequence or more"):
        rise_of([], [], [])
