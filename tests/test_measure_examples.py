# SPDX-License-Identifier: BSD-3-Clause
"""The examples that measure whole models run, on the smallest of them."""

import importlib
import json
import sys
from pathlib import Path

from sale_flex.demo.model import PACKAGED

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "examples"))

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 64,
}


def test_a_prefill_of_random_weights(tmp_path, capsys):
    file = tmp_path / "prefill.json"
    arguments = ["prefill", "--length", "1600", "--layers", "1", "--rounds", "1", "--search", "2"]
    assert (
        importlib.import_module("measure_models").main([*arguments, "--shape", json.dumps(SHAPE), "--json", str(file)])
        == 0
    )
    rows = json.loads(file.read_text())["rows"]
    assert rows["sdpa"]["density"] == 1.0
    assert 0 < rows["sale_flex"]["density"] < 1
    assert rows["stages"]["mask_ms"] > 0
    assert "everything else" in capsys.readouterr().out


def test_generation_from_a_trained_model(tmp_path):
    file = tmp_path / "generate.json"
    arguments = ["generate", str(PACKAGED), "--text", str(ROOT / "sale_flex" / "calibration"), "--length", "900"]
    arguments += ["--notes", "3", "--recalls", "1", "--rounds", "1", "--new-tokens", "4", "--min-length", "128"]
    arguments += ["--implementations", "sdpa,sale_flex", "--threshold", "0.001"]
    assert importlib.import_module("measure_models").main([*arguments, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert rows["sdpa"]["same_tokens"] == rows["sdpa"]["of"] == 1
    assert 0 < rows["sale_flex"]["density"] < 1


def test_a_calibration_beside_one_threshold(tmp_path, capsys):
    file = tmp_path / "calibration.json"
    arguments = [
        str(PACKAGED),
        "--text",
        str(ROOT / "sale_flex" / "calibration"),
        "--length",
        "768",
        "--min-length",
        "128",
    ]
    arguments += ["--notes", "3", "--recalls", "2", "--sequences", "1", "--calibration-sequences", "1"]
    arguments += ["--targets", "0.2", "--metrics", "mass", "--json", str(file)]
    assert importlib.import_module("measure_calibration").main(arguments) == 0
    rows = json.loads(file.read_text())["rows"]
    found = rows["mass, calibrated to 0.2"]
    assert 0 < found["largest"] <= 0.2
    assert found["transfer_largest"] > 0
    assert 0 < found["end"]["density"] < 1
    assert len(capsys.readouterr().out.splitlines()) == 4
