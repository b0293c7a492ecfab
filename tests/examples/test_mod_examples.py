# SPDX-License-Identifier: BSD-3-Clause
"""The examples of mods run, say what they did, and fail when their own check does."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

import sale_flex

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

EXAMPLES = {
    "packed_documents": ["--lengths", "300", "200", "260"],
    "sliding_window_sinks": ["--length", "700", "--window", "200"],
    "neighborhood_2d": ["--height", "16", "--width", "32", "--window", "7", "--dilation", "2"],
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_prints_one_line(name, capsys):
    assert importlib.import_module(name).main(EXAMPLES[name]) == 0
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    density, change = re.search(r"density ([01]\.\d+) .* changed by (0\.\d+)", line).groups()
    assert 0 < float(density) <= 1
    assert float(change) < 0.1


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_fails_when_attention_is_wrong(name, capsys, monkeypatch):
    module = importlib.import_module(name)

    def wrong(*args, **options):
        output, aux = sale_flex.sale_attention(*args, **options)
        return output * 1.01, aux

    monkeypatch.setattr(module, "sale_attention", wrong)
    assert module.main(EXAMPLES[name]) == 1
    assert "off by" in capsys.readouterr().err


def test_the_measurement_of_mods_writes_its_rows(tmp_path, capsys):
    path = tmp_path / "mods.json"
    arguments = ["--length", "512", "--compare-length", "256", "--heads", "2", "--kv-heads", "1", "--rounds", "1"]
    measure_mods = importlib.import_module("measure_mods")
    assert measure_mods.main([*arguments, "--head-dim", "32", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert [row["program"] for row in found["timed"]] == list(measure_mods.programs(512, 2, "cpu"))
    assert {row["score_mod"] for row in found["compared"]} >= {"alibi", "soft cap 50", "relative bias"}
    assert capsys.readouterr().out.count("\n") == len(found["timed"]) + len(found["compared"])
