# SPDX-License-Identifier: BSD-3-Clause
"""`sale-flex eval`: what it prints, writes, goes on with and refuses."""

import json
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from sale_flex import SaleConfig
from sale_flex.bench.model import find
from sale_flex.cli import main
from sale_flex.demo.model import PACKAGED
from sale_flex.demo.prompt import HELD_OUT, standard_library
from sale_flex.eval import subject
from sale_flex.eval.sequences import read_sequences

pytestmark = pytest.mark.usefixtures("uncompiled_attention")

OPTIONS = ["--lengths", "512", "--sequences", "2", "--min-length", "64", "--device", "cpu"]


def evaluate(out: Path, *arguments: str) -> int:
    return main(["eval", "demo", "--out", str(out), *OPTIONS, *arguments])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation of two rules, one of them at two thresholds."""
    out = tmp_path_factory.mktemp("eval") / "report"
    assert evaluate(out, "--rules", "default,mass/pool=1:0.0:0.3", "--json", str(out.parent / "all.json")) == 0
    return out


class Page(HTMLParser):
    """Which elements stand open, and how many of each there were."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: dict[str, int] = {}
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen[tag] = self.seen.get(tag, 0) + 1
        self.links += [value for name, value in attrs if name in ("src", "href") and not value.startswith("#")]
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen[tag] = self.seen.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_every_figure_stands_beside_dense_on_the_same_tokens(done):
    stored = json.loads((done / "report.json").read_text())
    assert stored == json.loads((done.parent / "all.json").read_text())
    by_rule = {one["rule"]: one for one in stored["outcomes"]}
    assert list(by_rule) == ["default", "mass/pool=1:0", "mass/pool=1:0.3"]
    rows = [json.loads(line) for line in (done / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * (1 + 3)
    dense = {row["sha256"]: row for row in rows if row["rule"] == "dense"}
    for label, one in by_rule.items():
        of = [row for row in rows if row["rule"] == label]
        rises = [row["loss"] - dense[row["sha256"]]["loss"] for row in of]
        assert one["rise"]["mean"] == pytest.approx(sum(rises) / 2, abs=1e-6)
        assert one["largest"] == pytest.approx(max(rises), abs=1e-9)
    # Threshold 0 keeps all; a high one keeps little, and the loss shows it.
    assert by_rule["mass/pool=1:0"]["density"] == 1.0
    assert by_rule["mass/pool=1:0"]["rise"]["mean"] == pytest.approx(0.0, abs=1e-5)
    assert by_rule["mass/pool=1:0.3"]["density"] < by_rule["default"]["density"] < 1.0
    assert by_rule["mass/pool=1:0.3"]["rise"]["mean"] > by_rule["default"]["rise"]["mean"]


def test_the_report_is_one_page_with_its_pictures_in_it(done):
    page = Page()
    page.feed((done / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    assert page.links == []  # nothing is loaded from elsewhere
    assert page.seen["svg"] == 1 + 1 + 3  # the trade, along a sequence, and a map of heads for every rule
    text = (done / "report.md").read_text()
    assert "| 512 | mass/pool=1:0.3 |" in text
    assert f"torch {torch.__version__}" in text


def test_resuming_measures_what_is_missing_alone(done, capsys, monkeypatch):
    before = (done / "rows.jsonl").read_text()
    monkeypatch.setattr(subject.Subject, "measure", lambda *_: pytest.fail("measured again"))
    assert evaluate(done, "--rules", "default", "--resume") == 0
    assert (done / "rows.jsonl").read_text() == before
    assert evaluate(done, "--rules", "default") == 2
    assert "--resume" in capsys.readouterr().err


def test_json_can_take_the_place_of_the_text(tmp_path, capsys):
    assert evaluate(tmp_path, "--quick", "--sequences", "1", "--max-rise", "5", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "report.json").read_text())


def test_quick_passes_or_names_the_setting_that_does(tmp_path, capsys):
    assert evaluate(tmp_path / "pass", "--quick", "--max-rise", "5") == 0
    assert capsys.readouterr().out.startswith("PASS default: rise in loss")
    assert evaluate(tmp_path / "fail", "--quick", "--rules", "mass:0.9", "--max-rise", "0.02") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith(("PASS", "No setting"))
    stored = json.loads((tmp_path / "fail" / "report.json").read_text())["verdict"]
    assert not stored["passes"]
    assert stored["tried"]
    assert "Fail" in (tmp_path / "fail" / "report.html").read_text()


def test_the_model_is_left_as_it_was():
    from sale_flex.bench.model import load
    from sale_flex.eval.subject import Subject

    model, _ = load(str(PACKAGED), torch.float32, torch.device("cpu"))
    part = read_sequences([standard_library() / f"{HELD_OUT[0]}.py"], 256, 1, find(str(PACKAGED)))[0]
    before, wanted = model.config._attn_implementation, model(part.text.input_ids).logits
    with Subject.running(model) as running:
        found = running.measure(part.text, SaleConfig(min_length=64))
        dense = running.measure(part.text, None)
    assert len(found.losses) == 255
    assert found.density
    assert dense.density == []
    assert model.config._attn_implementation == before
    assert torch.equal(model(part.text.input_ids).logits, wanted)


def test_sequences_are_parts_in_turn_of_every_file():
    checkpoint = find(str(PACKAGED))
    paths = [standard_library() / f"{name}.py" for name in HELD_OUT[:2]]
    found = read_sequences(paths, 300, 3, checkpoint)
    assert [part.name for part in found] == [f"{HELD_OUT[0]}.py 1", f"{HELD_OUT[1]}.py 1", f"{HELD_OUT[0]}.py 2"]
    assert all(part.text.input_ids.shape == (1, 300) for part in found)
    assert {int(part.text.input_ids[0, 0]) for part in found} == {checkpoint.bos}
    whole = checkpoint.tokenizer(paths[0].read_text("utf-8"), add_special_tokens=False).input_ids
    assert found[2].text.input_ids[0, 1:].tolist() == whole[299 : 2 * 299]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rules", "nothing"], "a rule's name must be one of"),
        (["--quick", "--rules", "default,fast"], "--quick judges one rule, got default, fast"),
        (["--lengths", "1"], "--lengths"),
        (["--lengths", "99999999"], "--lengths must be at most"),
        (["--sequences", "0"], "--sequences must be 1 or more, got 0"),
        (["--max-rise", "-1"], "--max-rise must be 0 or more"),
        (["--texts", "nowhere.txt"], "nowhere.txt is not there"),
    ],
)
def test_what_can_not_be_is_refused_before_the_model_is_loaded(arguments, says, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sale_flex.bench.model.load", lambda *_: pytest.fail("loaded"))
    assert evaluate(tmp_path / "out", *arguments) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named_with_its_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert evaluate(tmp_path / "out", "--gguf", "model.gguf") == 2
    assert "needs gguf, which is not installed: pip install 'sale-flex[eval]'" in capsys.readouterr().err


def test_a_model_needs_texts(tmp_path, capsys):
    assert main(["eval", str(PACKAGED), "--out", str(tmp_path / "out")]) == 2
    assert "--texts must name files" in capsys.readouterr().err
