# SPDX-License-Identifier: BSD-3-Clause
"""Pass, fail, and the setting that passes."""

import json

import pytest

from sale_flex import Mass, Relative, SaleConfig
from sale_flex.eval.paired import Rise
from sale_flex.eval.run import Outcome
from sale_flex.eval.verdict import judge, safer


def outcome(label: str, rise: float, half: float = 0.001, density: float | None = 0.1) -> Outcome:
    return Outcome(label, 8192, Rise(rise, rise - half, rise + half), rise, density, 0.05, 1.0, 2.0)


def measured(rises: dict[str, float]):
    asked = []

    def measure(label: str, config: SaleConfig) -> Outcome:
        asked.append((label, config))
        return outcome(label, rises.get(label, 0.5))

    return measure, asked


def test_what_passes_is_not_tried_further():
    measure, asked = measured({"default": 0.004})
    verdict = judge("default", SaleConfig(), 0.01, measure)
    assert verdict.passes
    assert verdict.setting == SaleConfig()
    assert [label for label, _ in asked] == ["default"]
    assert verdict.describe().startswith("PASS default: rise in loss +0.0040 [+0.0030, +0.0050] at 8192 tokens")
    json.dumps(verdict.to_dict())


def test_what_fails_ends_with_the_cheapest_setting_that_passes():
    measure, asked = measured({"fast": 0.06, "default": 0.02, "default:0.005": 0.009})
    verdict = judge("fast", SaleConfig(Mass.fast()), 0.01, measure)
    assert not verdict.passes
    assert [label for label, _ in asked] == ["fast", "default", "default:0.005"]
    assert verdict.setting == SaleConfig(Mass(0.005))
    lines = verdict.describe().splitlines()
    assert [line.split()[:2] for line in lines] == [["FAIL", "fast:"], ["FAIL", "default:"], ["PASS", "default:0.005:"]]


def test_where_nothing_passes_it_says_so():
    verdict = judge("relative", SaleConfig(Relative()), 0.01, measured({})[0])
    assert verdict.setting is None
    assert "No setting that was tried passes" in verdict.describe()


@pytest.mark.parametrize("rise", [float("nan"), float("inf"), 0.0101])
def test_what_is_no_small_number_fails(rise):
    assert not judge("default", SaleConfig(), 0.01, lambda label, config: outcome(label, rise)).passes


def test_an_interval_that_reaches_beyond_is_named_and_so_is_a_dense_run():
    wide = judge("default", SaleConfig(), 0.01, lambda label, config: outcome(label, 0.008, 0.01))
    assert "more text would tell" in wide.describe()
    dense = judge("default", SaleConfig(), 0.01, lambda label, config: outcome(label, 0.0, density=None))
    assert "nothing was tested" in dense.describe()


@pytest.mark.parametrize(
    "config", [SaleConfig(), SaleConfig(Mass.fast()), SaleConfig(Relative()), SaleConfig(Mass(pool=1))]
)
def test_safer_settings_are_others_and_differ(config):
    found = [other for _, other in safer("it", config)]
    assert config not in found
    assert all(one != other for n, one in enumerate(found) for other in found[:n])
