# SPDX-License-Identifier: BSD-3-Clause
"""The example that measures quality: calibration and needle rows by definition, equal loss, files it goes on from."""

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

pytest.importorskip("transformers")
from transformers import LlamaConfig, LlamaForCausalLM

from sale_flex import Mass, Relative, SaleConfig, attention, create_sale_block_mask
from sale_flex.bench.captured import Captured
from sale_flex.demo.model import PACKAGED
from sale_flex.testing import Shape, block_map, expand_blocks, plant_needle, random_inputs

sys.path += [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2] / "examples")]
import measure_quality
import quality_model
import quality_rules
from config_harness import as_rule
from quality_rules import Needed, Point, Rows, density_needed, parse_rules, ratio, verdict

pytestmark = pytest.mark.usefixtures("uncompiled_attention")

COMMON = SaleConfig(min_length=64, local_tokens=64)
SHAPE = Shape(448, 448, heads=4, kv_heads=2, head_dim=32)


@pytest.fixture
def coarse(monkeypatch) -> list[float]:
    """Calibration over thresholds at which short noise loses blocks; returned are the ones it may choose, but 0."""
    monkeypatch.setattr(quality_model, "LAST_TAU", 0.1)
    return [8.0 / 2**n for n in range(7)]


def captured(seed: int, *strengths: float) -> Captured:
    """Noise, with logits of a size by head."""
    query, key, value = random_inputs(SHAPE, seed)
    return Captured(query * torch.tensor(strengths)[:, None, None], key, value, 32**-0.5)


def test_rules_as_they_are_written():
    rules = parse_rules("relative:0.004:0.016, moments/pool=1/block_size=64x32:0.02,calibrated/bits=8:0.1", COMMON)
    assert [rule.label for rule in rules] == [
        "relative:0.004",
        "relative:0.016",
        "moments/pool=1/block_size=64x32:0.02",
        "calibrated/bits=8:0.1",
    ]
    assert rules[1].config == as_rule(COMMON, "relative").with_options(threshold=0.016, bits=4)
    fast = SaleConfig(Mass.fast(0.02), min_length=64, local_tokens=64)
    assert rules[2].config == fast.with_options(pool=1, block_size=(64, 32))
    assert rules[3].config == replace(COMMON, rule=Relative(bits=8))
    assert [rule.calibrated for rule in rules] == [False, False, False, True]
    late = parse_rules("calibrated:0.1,calibrated/start=0.1:0.1", COMMON)
    assert [rule.start for rule in late] == [0.008, 0.1]
    assert [rule.fields["start"] for rule in late] == [0.008, 0.1]
    assert parse_rules("none", COMMON) == parse_rules("", COMMON) == []
    for default in (quality_rules.RULES, quality_rules.NEEDLE_RULES):
        assert all(rule.config.min_length == 64 for rule in parse_rules(default, COMMON))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mean:0.1", "name must be one of moments, scan"),
        ("scan", "needs a threshold, such as scan:0.01"),
        ("scan/query_pool=4:0.1", "option must be one of pool"),
        ("scan/pool=x:0.1", "pool must be N"),
        ("scan/pool=3:0.1", "pool must be one of"),
        ("scan/start=0.1:0.1", "option must be one of"),
        ("scan/block_size=64:0.1", "block_size must be"),
        ("scan:high", "could not convert"),
        ("calibrated:-1", "threshold must be 0 or more"),
    ],
)
def test_wrong_rules_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_rules(text, COMMON)


def points(*pairs: tuple[float, float]) -> list[Point]:
    return [Point("", density, rise, 0.0) for density, rise in pairs]


def test_density_needed():
    curve = points((0.1, 0.008), (0.4, 0.002), (0.2, 0.004))
    assert density_needed(curve, 0.004).low == pytest.approx(0.2)
    halfway = density_needed(curve, 0.006)
    assert halfway.low == halfway.high == pytest.approx(math.sqrt(0.02))
    assert density_needed(curve, 0.001) == Needed(0.4, 1.0)
    assert density_needed(curve, 0.008) == Needed(0.0, 0.1)
    # A rise that falls again with the density does not count.
    assert density_needed(points((0.4, 0.002), (0.2, 0.007), (0.1, 0.005)), 0.006).low > 0.2
    assert [str(density_needed(curve, rise)) for rise in (0.001, 0.004, 0.01)] == ["> 0.400", "0.200", "< 0.100"]


@pytest.mark.parametrize(
    ("of", "to", "expected"),
    [
        ((0.1, 0.1), (0.4, 0.4), "0.25"),
        ((0.0, 0.1), (0.4, 0.4), "< 0.25"),
        ((0.0, 0.1), (0.4, 1.0), "< 0.25"),
        ((0.1, 0.1), (0.4, 1.0), "< 0.25"),
        ((0.1, 1.0), (0.4, 0.4), "> 0.25"),
        ((0.1, 1.0), (0.0, 0.4), "> 0.25"),
        ((0.1, 0.1), (0.0, 0.4), "> 0.25"),
        ((0.1, 1.0), (0.4, 1.0), "?"),
        ((0.0, 0.1), (0.0, 0.4), "?"),
    ],
)
def test_ratios_say_what_is_known(of, to, expected):
    assert ratio(Needed(*of), Needed(*to)) == expected


def test_verdicts():
    relative = Needed(0.4, 0.4)
    assert verdict(Point("", 0.2, 0.006, -0.05), relative) == "yes: 0.50"
    assert verdict(Point("", 0.24, 0.001, 0.0), relative) == "no: 0.60"
    assert verdict(Point("", 0.1, 0.0061, 0.0), relative) == "no: rise +0.0061"
    assert verdict(Point("", 0.1, 0.0, -0.06), relative) == "no: recall -0.060"
    assert verdict(Point("", 0.1, 0.0, 0.0), Needed(0.4, 1.0)) == "yes: < 0.25"
    assert verdict(Point("", 0.3, 0.0, 0.0), Needed(0.4, 1.0)) == "open: < 0.75"
    assert verdict(Point("", 0.1, 0.0, 0.0), Needed(0.0, 0.4)) == "open: > 0.25"


def test_means_and_sequences():
    rows = [
        {"sample": n, "placement": place, "rule": rule, "density": d, "rise": d / 100, "recall over dense": 0.0}
        for n, place in enumerate(("end", "scattered"))
        for rule, d in (("relative:0.01", 0.4 + n / 10), ("relative:0.02", 0.2), ("moments:0.01", 0.1))
    ]
    rules = parse_rules("relative:0.01:0.02,moments:0.01", COMMON)
    columns = quality_rules.collect_points(rows, rules)
    assert list(columns) == ["mean", "1 end", "2 scattered"]
    assert [point.density for point in columns["mean"]["relative"]] == pytest.approx([0.45, 0.2])
    assert [point.density for point in columns["2 scattered"]["relative"]] == pytest.approx([0.5, 0.2])
    (row,) = quality_rules.half_density(columns, rules)
    assert row == {
        "rule": "moments:0.01",
        "mean": "open: > 0.50",
        "1 end": "open: > 0.50",
        "2 scattered": "open: > 0.50",
    }


def test_rows_are_measured_once(tmp_path, capsys):
    path, made = tmp_path / "rows.json", []

    def measure():
        made.append(len(made))
        return {"rise": float(len(made))}

    run = {"device": "d", "torch": "t", "commit": "c"}
    asked = {"kind": "quality", "rule": "scan:1", "block_size": (64, 64)}
    first = Rows(path, False, run).once(asked, measure)
    assert Rows(path, False, run).once(asked, measure) == json.loads(path.read_text())[0] == first
    assert made == [0]
    assert "quality: rule scan:1, rise 1.0000" in capsys.readouterr().err
    rows = Rows(path, False, run)
    rows.once(asked | {"rule": "scan:2"}, measure)
    assert [row["rise"] for row in rows.rows] == [1.0, 2.0]
    # Of another commit: anew, and in the place of the old one.
    rows = Rows(path, False, run | {"commit": "e"})
    rows.once(asked, measure)
    assert [(row["rule"], row["commit"]) for row in json.loads(path.read_text())] == [("scan:2", "c"), ("scan:1", "e")]
    assert Rows(path, True, run).rows == []


@pytest.mark.parametrize(("allowed", "relative"), [(0.2, True), (0.6, False)])
def test_calibration_is_the_largest_halving_that_errs_by_little(coarse, allowed, relative):
    tensors, config = captured(0, 0.7, 1.0, 2.0, 3.0), as_rule(COMMON, "relative")
    dense = scaled_dot_product_attention(*tensors[:3], is_causal=True, enable_gqa=True)
    limit = allowed * dense.abs().sum(-1).mean((0, 2)) if relative else torch.full((4,), allowed)
    expected = [0.0] * 4
    for tau in reversed(coarse):
        output = attention.sale_attention(*tensors[:3], config.with_options(threshold=tau))
        below = (output - dense).abs().sum(-1).mean((0, 2)) < limit
        expected = [tau if passes else last for last, passes in zip(expected, below.tolist())]
    assert len(set(expected)) > 2
    assert quality_model.calibrate([{3: tensors}], config, coarse[0], allowed, relative) == {3: expected}


def test_calibration_only_falls_and_ends_dense(coarse):
    config = as_rule(COMMON, "relative")
    samples = [{0: captured(0, 1.0, 2.0, 2.0, 3.0)}, {0: captured(1, 3.0, 2.0, 2.0, 1.0)}]
    first, second = (quality_model.calibrate([sample], config, coarse[0], 0.2, True)[0] for sample in samples)
    both = quality_model.calibrate(samples, config, coarse[0], 0.2, True)[0]
    assert all(tau <= min(pair) for tau, *pair in zip(both, first, second))
    assert both not in (first, second)
    assert quality_model.calibrate(samples, config, coarse[0], 0.0, True)[0] == [0.0] * 4
    assert quality_model.calibrate(samples, config, coarse[0], 1e9, False)[0] == [8.0] * 4


@pytest.mark.parametrize("block_size", [(64, 64), (128, 64), (64, 32)])
def test_needles_are_what_they_are_called(block_size):
    config = replace(COMMON, block_size=block_size)
    inputs = random_inputs(SHAPE, 5)
    for head, row, column in ((0, 300, 100), (3, 447, 200), (2, 400, 5), (1, 260, 250)):
        inputs = plant_needle(inputs, query=row, key=column, logit=12.0, head=head, seed=row)
    tensors = Captured(*inputs, 32**-0.5)
    logits = inputs[0].double() @ inputs[1].double().repeat_interleave(2, 1).mT * tensors.scale
    causal = torch.ones(448, 448, dtype=torch.bool).tril()
    weights = logits.masked_fill(~causal, -torch.inf).softmax(-1)
    kept_anyway = block_map(create_sale_block_mask(*inputs[:2], config.with_options(threshold=1.0))).kept
    far = causal & ~expand_blocks(kept_anyway, block_size, 448, 448)
    expected = {tuple(at) for at in ((weights >= 0.6) & far)[0].nonzero().tolist()}
    needles = quality_model.find_needles(tensors, config, chunk=100)
    assert {tuple(needle) for needle in needles.tolist()} == expected
    assert {(0, 300, 100), (3, 447, 200)} <= expected
    for threshold, all_kept in ((0.0, True), (1.0, False)):
        hits, stats = quality_model.kept_needles(tensors, config.with_options(threshold=threshold), needles)
        assert hits.tolist() == [all_kept] * len(needles)
        assert (int(stats.kept_blocks.sum()) == int(stats.visible_blocks.sum())) == all_kept


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a tiny random model, a tokenizer and text."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("quality")
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=4096, **sizes, **heads)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PACKAGED / name, folder)
    (folder / "text").mkdir()
    for n in range(12):
        text = "".join(f"def f{n}_{line}(x):\n    return x + {line * n}\n" for line in range(40))
        (folder / "text" / f"{n}.py").write_text(text)
    return folder


def run(folder: Path, *arguments: str) -> int:
    base = [str(folder), "--text", str(folder / "text"), "--length", "448", "--notes", "4", "--recalls", "3"]
    base += ["--min-length", "64", "--device", "cpu", "--calibration-length", "256", "--needle-length", "320"]
    return measure_quality.main([*base, *arguments])


def test_a_run_and_its_continuation(folder, tmp_path, capsys, monkeypatch):
    path = tmp_path / "quality.json"
    arguments = ["--sequences", "2", "--json", str(path), "--needles", "--needle-rules", "moments:0.3"]
    assert run(folder, *arguments, "--rules", "relative:0:5,calibrated:0.01,moments:0.3") == 0
    out = capsys.readouterr().out
    assert "| moments:0.3 |" in out
    assert "mean: holds for" in out
    rows = json.loads(path.read_text())
    of = {kind: [row for row in rows if row["kind"] == kind] for kind in {row["kind"] for row in rows}}
    assert {kind: len(found) for kind, found in of.items()} == {
        "calibration": 1,
        "equal loss": 6,
        "half density": 1,
        "needles": 2,
        "quality": 4 * 5,
    }
    assert len({row["sequence"] for row in of["quality"]}) == 4
    assert {row["placement"] for row in of["quality"]} == {"end", "scattered"}
    assert not {row["sequence"] for row in of["needles"]} & {row["sequence"] for row in of["quality"]}
    assert of["calibration"][0]["thresholds"].keys() == {"0", "1"}
    dense, everything = ([row for row in of["quality"] if row["rule"] == name] for name in ("dense", "relative:0"))
    for exact, kept in zip(dense, everything):
        assert exact["density"] == kept["density"] == 1
        assert kept["rise"] == pytest.approx(0, abs=1e-5)
        assert "flex_attention" in kept["path"]
        assert "dense scaled" not in kept["path"]
    assert all(row["density"] < 1 for row in of["quality"] if row["rule"] in ("relative:5", "moments:0.3"))

    # Nothing is measured again, and a rule that is new alone.
    evaluate, seen = quality_model.evaluate, []
    monkeypatch.setattr(quality_model, "evaluate", lambda *given: seen.append(given) or evaluate(*given))
    monkeypatch.setattr(quality_model, "calibrate", None)
    assert run(folder, *arguments, "--rules", "relative:0:5,calibrated:0.01,moments:0.3") == 0
    assert capsys.readouterr().out == out
    assert not seen
    assert run(folder, *arguments, "--rules", "relative:5,scan:0.05") == 0
    assert len(seen) == 4
    assert run(folder, *arguments, "--rules", "none") == 0
    assert "share kept" in capsys.readouterr().out


def test_single_rules_and_masks(folder, tmp_path, capsys):
    assert run(folder, "--rule", "relative", "--thresholds", "0.1", "--placement", "end") == 0
    assert "| relative:0.1 |" in capsys.readouterr().out
    assert run(folder, "--check-mask", "--rule", "scan", "--thresholds", "0.01,0.1", "--layers", "1") == 0
    assert "| scan:0.1 | 1 |" in capsys.readouterr().out
    for wrong in (
        ["--rules", "scan"],
        ["--rules", "scan:1", "--rule", "scan"],
        ["--json", "no/where"],
    ):
        with pytest.raises(SystemExit):
            run(folder, *wrong)
