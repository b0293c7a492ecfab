# SPDX-License-Identifier: BSD-3-Clause
"""Rules as the command line has them."""

import pytest

from sale_flex import Mass, Relative, SaleConfig
from sale_flex.eval.rules import parse_rules


def test_names_options_and_thresholds():
    found = parse_rules(
        "default, fast:0.005:0.01, relative/bits=8/min_length=64:0.004,mass/block_size=128x64/pool=1", 256
    )
    assert found == {
        "default": SaleConfig(min_length=256),
        "fast:0.005": SaleConfig(Mass.fast(0.005), min_length=256),
        "fast:0.01": SaleConfig(Mass.fast(0.01), min_length=256),
        "relative/bits=8/min_length=64:0.004": SaleConfig(Relative(0.004, bits=8), min_length=64),
        "mass/block_size=128x64/pool=1": SaleConfig(Mass(pool=1), block_size=(128, 64), min_length=256),
    }
    assert parse_rules("mass/max_blocks=none/on_miss=dense")["mass/max_blocks=none/on_miss=dense"].on_miss == "dense"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nothing", "a rule's name must be one of default, fast, .*got 'nothing'"),
        ("default/pool", "an option must be NAME=VALUE, got 'pool'"),
        ("default/pols=2", "got 'pols'"),
        ("default/pool=3", "pool must be one of"),
        ("default:much", "could not convert"),
        ("default:-1", "threshold must be 0 or more"),
        ("default/block_size=64", "invalid literal"),
    ],
)
def test_what_is_wrong_is_named(text, says):
    with pytest.raises(ValueError, match=f"--rules '{text}': .*{says}"):
        parse_rules(text)
