# SPDX-License-Identifier: BSD-3-Clause
"""examples/generate.py answers from its notes, and fails when the sparse answer is another one."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

import sale_flex.integrations.transformers as sale_hf

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

ARGUMENTS = ["--tokens", "1536", "--min-length", "256", "--threshold", "0.01"]


@pytest.fixture
def example():
    yield importlib.import_module("generate")
    sale_hf.register()


def test_it_recalls_the_note_both_ways(example, capsys):
    assert example.main(ARGUMENTS) == 0
    out = capsys.readouterr().out
    assert out.count(f"'{example.NOTE}") == 2
    density = float(out.rpartition("density ")[2].partition(",")[0])
    assert 0 < density < 0.9
    assert "not recalled" not in out


def test_it_fails_when_the_answers_differ(example, capsys, monkeypatch):
    def blind(module, query, *_, **__):
        return torch.zeros_like(query).transpose(1, 2), None

    monkeypatch.setattr(sale_hf, "sale_flex_forward", blind)
    assert example.main(ARGUMENTS) == 1
    assert "differs from the dense one" in capsys.readouterr().err
