# SPDX-License-Identifier: BSD-3-Clause
"""The examples that measure whole models run, on the smallest of them."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from sale_flex.demo.model import PACKAGED

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "examples"))

pytestmark = pytest.mark.usefixtures("uncompiled_attention")

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
    arguments += ["--targets", "0.2", "--rules", "mass", "--json", str(file)]
    assert importlib.import_module("measure_calibration").main(arguments) == 0
    rows = json.loads(file.read_text())["rows"]
    found = rows["mass, calibrated to 0.2"]
    assert 0 < found["largest"] <= 0.2
    assert found["transfer_largest"] > 0
    assert 0 < found["end"]["density"] < 1
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_rules_beside_exact_masses(tmp_path, capsys):
    file, texts = tmp_path / "trust.json", [tmp_path / "a.txt", tmp_path / "b.json"]
    words = "".join(path.read_text("utf-8") for path in sorted((ROOT / "sale_flex" / "calibration").glob("*.py")))
    texts[0].write_text(words[:20000], "utf-8")
    texts[1].write_text(json.dumps([n % 250 for n in range(2000)]), "utf-8")
    arguments = [str(PACKAGED), "--texts", *map(str, texts), "--length", "640", "--min-length", "128"]
    arguments += ["--json", str(file), "--rules", "scan:0.02,exact:0.02,moments:0.02,scan:1"]
    main = importlib.import_module("measure_trust").main
    assert main(arguments) == 0
    rows = json.loads(file.read_text())
    assert [(row["rule"], row["sequence"]) for row in rows] == [
        (rule, name) for rule in ("scan:0.02", "exact:0.02", "moments:0.02", "scan:1") for name in "ab"
    ]
    default, exact, nothing = (row for row in rows if row["sequence"] == "a" and row["rule"] != "moments:0.02")
    assert abs(default["rise"] - exact["rise"]) < 0.002
    assert 1 <= default["density"] / exact["density"] < 1.1
    assert torch.tensor(default["wanted"]).shape == torch.tensor(exact["wanted"]).shape == (4, 4)
    # Layers behind the first see what the first has made of it: the same to a percent.
    torch.testing.assert_close(torch.tensor(default["wanted"]), torch.tensor(exact["wanted"]), rtol=0.05, atol=0.05)
    assert torch.tensor(nothing["missed"]).sum() > 10 * torch.tensor(default["missed"]).sum()
    assert nothing["rise"] > default["rise"] + 0.01
    # A second run measures nothing again, and prints the same table.
    table = capsys.readouterr().out
    assert main(arguments) == 0
    assert json.loads(file.read_text()) == rows
    assert capsys.readouterr().out == table
    assert len(table.splitlines()) == 2 + 4


def test_what_rules_can_not_be_measured_on(tmp_path, capsys):
    main = importlib.import_module("measure_trust").main
    short = tmp_path / "short.txt"
    short.write_text("A few words.", "utf-8")
    for arguments, message in (
        (["--length", "1000"], "multiple of 128 above --min-length, got 1000"),
        (["--length", "640", "--rules", "calibrated:0.1"], "calibrated rules are measured by measure_quality.py"),
        (["--length", "640", "--rules", "best:0.1"], "a rule's name must be one of"),
    ):
        with pytest.raises(SystemExit):
            main([str(PACKAGED), "--texts", str(short), "--min-length", "128", *arguments])
        assert message in capsys.readouterr().err
    assert main([str(PACKAGED), "--texts", str(short), "--min-length", "128", "--length", "640"]) == 1
    assert "short.txt has" in capsys.readouterr().err
