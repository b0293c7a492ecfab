# SPDX-License-Identifier: BSD-3-Clause
"""A rule of one's own, examples/antidiagonal_rule.py, everywhere that rules go; and what registering refuses."""

import ast
import importlib.metadata
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from sale_flex import (
    AuxRequest,
    Mass,
    Relative,
    Rule,
    SaleConfig,
    create_sale_block_mask,
    register_rule,
    sale_attention,
)
from sale_flex._console.stored import sale_config, stored_config
from sale_flex.bench.inputs import Inputs
from sale_flex.bench.stages import WHOLE, Stages
from sale_flex.bench.threshold import find_threshold
from sale_flex.calibration.goal import Goal
from sale_flex.calibration.search import Call, find_thresholds
from sale_flex.selection.rules import base, rule_named, rule_names
from sale_flex.testing import (
    Shape,
    assert_attention_close,
    block_map,
    causal_mask,
    expand_blocks,
    structured_inputs,
)
from sale_flex.testing.programs import PROGRAMS

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

from antidiagonal_rule import Antidiagonal, main

ROOT = Path(__file__).resolve().parents[2]
SHAPE = Shape(640, 640, heads=4, kv_heads=2, head_dim=64)
CONFIG = SaleConfig(Antidiagonal(0.03), min_length=64, sink_tokens=8, local_tokens=32)


@pytest.fixture
def registry(monkeypatch):
    """A registry that forgets."""
    monkeypatch.setattr(base, "_RULES", dict(base._RULES))
    return base._RULES


def test_the_example_runs(capsys):
    assert main(["--length", "512"]) == 0
    assert capsys.readouterr().out.count("density") == 2


def test_scores_are_shares_of_the_softmax_over_antidiagonal_sums():
    inputs = structured_inputs(SHAPE, 3)
    config = replace(CONFIG, rule=Antidiagonal(0.03, stride=4))
    mask = create_sale_block_mask(inputs.query, inputs.key, config)
    kept = block_map(mask).kept[0]
    query, key = inputs.query[0].double(), inputs.key[0].double().repeat_interleave(2, 0)
    n = torch.arange(160)
    sums = torch.zeros(4, 160, 160, dtype=torch.float64)
    for step in range(4):
        sums += query[:, 4 * n + 3 - step] @ key[:, 4 * n + step].mT
    block = n // 16
    sums = (sums / 8 / 4).masked_fill(block > block[:, None], -torch.inf)
    scores = sums.softmax(-1).view(4, 10, 16, 10, 16).sum(-1).mean(2)
    unsure = (scores - 0.03).abs() < 1e-6
    always = block_map(create_sale_block_mask(inputs.query, inputs.key, CONFIG.with_threshold(2.0))).kept[0]
    expected = always | ((scores >= 0.03) & torch.ones(10, 10).tril().bool())
    assert torch.equal(kept | unsure, expected | unsure)
    assert 0.2 < (kept & ~always).sum() / (torch.ones(10, 10).tril().bool() & ~always).sum() < 0.8


def test_attention_is_exact_on_what_the_rule_keeps():
    query, key, value = structured_inputs(SHAPE, 1)
    output, (_, stats) = sale_attention(query, key, value, CONFIG, return_aux=AuxRequest(stats=True))
    kept = block_map(create_sale_block_mask(query, key, CONFIG, value=value)).kept
    assert_attention_close(output, query, key, value, causal_mask(SHAPE) & expand_blocks(kept, (64, 64), 640, 640))
    assert torch.equal(stats.kept_blocks, kept.sum((2, 3)))
    assert stats.audit.rows.sum() > 0


@pytest.mark.parametrize("program", ["causal", "documents", "alibi", "everything", "a block mask"])
def test_under_mods_nothing_hidden_is_kept(program):
    inputs, options = structured_inputs(SHAPE, 2), PROGRAMS[program](SHAPE, "cpu")
    mask, stats = create_sale_block_mask(inputs.query, inputs.key, CONFIG, stats=True, **options)
    everything = create_sale_block_mask(inputs.query, inputs.key, CONFIG.with_threshold(0.0), **options)
    kept, visible = block_map(mask).kept, block_map(everything).kept
    assert bool((kept <= visible).all())
    assert bool((stats.kept_blocks < stats.visible_blocks).any())


def test_in_the_benchmark():
    inputs = Inputs(*structured_inputs(SHAPE, 1), 0.125)
    config = find_threshold(inputs, CONFIG, 0.6)
    found = create_sale_block_mask(inputs.query, inputs.key, config, stats=True).stats
    assert found.kept_blocks.sum() / found.visible_blocks.sum() == pytest.approx(0.6, abs=0.05)
    stages = Stages(inputs, config)
    for name, run in stages.runs().items():
        if name != WHOLE:
            run()


def test_in_calibration_by_scores_and_by_calls_alike():
    query, key, value = structured_inputs(SHAPE, 5)
    thresholds = find_thresholds(Call(query, key, value, CONFIG), Goal(0.2))
    assert bool((thresholds > 0).any())
    by_scores, by_calls = (Call(query, key, value, CONFIG).attend(by) for by in (True, False))
    # The same blocks; the dense rows come from another kernel.
    torch.testing.assert_close(by_scores(thresholds), by_calls(thresholds))


def test_a_config_with_it_is_stored_and_read():
    stored = json.loads(json.dumps(stored_config(CONFIG, threshold=True)))
    assert stored["rule"] == {"name": "my_antidiagonal", "threshold": 0.03, "stride": 8}
    assert sale_config(threshold=True, partial=False)(stored, "") == CONFIG
    assert SaleConfig.from_options("my_antidiagonal", stride=16).rule == Antidiagonal(stride=16)


def test_rules_are_compared_by_kind_and_value():
    assert Antidiagonal(0.1) == Antidiagonal(0.1)
    assert Antidiagonal(0.1) != Antidiagonal(0.2)
    assert Mass(0.1) != Relative(0.1)
    assert Mass(torch.tensor([0.1])) == Mass(torch.tensor([0.1]))
    assert len({Mass(), Mass(), Mass(bits=4), Relative()}) == 3


def test_options_of_the_rule_are_checked_with_the_blocks():
    with pytest.raises(ValueError, match=r"stride must divide the blocks' \(64, 64\) rows and keys, got 48"):
        SaleConfig(Antidiagonal(stride=48))


def test_register_refuses_what_is_no_rule(registry):
    with pytest.raises(TypeError, match=r"a subclass of sale_flex\.Rule, got 'mass'"):
        register_rule("mass")
    with pytest.raises(TypeError, match=r"Nameless.name must be a string.*got None"):
        register_rule(type("Nameless", (Rule,), {}))
    with pytest.raises(ValueError, match=r"Thief.name must be of no other rule, got 'mass', which is Mass's"):
        register_rule(type("Thief", (Rule,), {"name": "mass"}))
    assert register_rule(Mass) is Mass


def test_a_rule_without_scores_and_select_says_so():
    @dataclass(frozen=True, eq=False)
    class Empty(Rule):
        name: ClassVar[str] = "empty"

    inputs = structured_inputs(SHAPE, 0)
    with pytest.raises(NotImplementedError, match="Empty has no scores; define them, or `select`"):
        create_sale_block_mask(inputs.query, inputs.key, SaleConfig(Empty(0.1), min_length=0))


def test_entry_points_are_loaded_when_they_are_asked_for(registry, monkeypatch):
    entry = importlib.metadata.EntryPoint("elsewhere", "antidiagonal_rule:Elsewhere", base.GROUP)
    loaded = []

    class Elsewhere(Antidiagonal):
        name = "elsewhere"

    def load(self):
        loaded.append(self.name)
        return Elsewhere

    monkeypatch.setattr(importlib.metadata.EntryPoint, "load", load)
    monkeypatch.setattr(base, "entry_points", lambda group: [entry] if group == base.GROUP else [])
    assert "elsewhere" in rule_names()
    assert not loaded
    assert rule_named("elsewhere") is Elsewhere
    assert rule_named("elsewhere") is Elsewhere
    assert loaded == ["elsewhere"]
    with pytest.raises(ValueError, match=r"rule must be one of .*'elsewhere'.*got 'nowhere'; a rule"):
        rule_named("nowhere")


@pytest.mark.parametrize("path", sorted((ROOT / "sale_flex").rglob("*.py")), ids=lambda path: path.name)
def test_nobody_but_a_rule_branches_on_its_name(path):
    # The reference stands alone and has a table; what is known of families of models is known of one rule.
    if path.parent.name in ("rules", "reference"):
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare):
            names = [x.value for x in ast.walk(node) if isinstance(x, ast.Constant)]
            assert not {"mass", "relative"} & {x for x in names if isinstance(x, str)} or "goal" in path.name, (
                f"line {node.lineno}"
            )
