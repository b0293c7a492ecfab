# SPDX-License-Identifier: BSD-3-Clause
"""The demo: its prompt, its figures, its command line, and the packaged model doing the task."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from sale_flex.cli import main
from sale_flex.demo import picture, table
from sale_flex.demo.model import PACKAGED
from sale_flex.demo.prompt import BOS, HELD_OUT, build_prompt, held_out_texts, score
from sale_flex.demo.run import Report

LINE = re.compile(r"^# (note|recall) ([0-9a-f]{6}) = ([0-9a-f]{6})$", re.M)
KEYS = {
    "density",
    "dense_loss",
    "sale_loss",
    "dense_recall",
    "sale_recall",
    "dense_seconds",
    "sale_seconds",
    "tokens",
    "device",
}
GOOD = Report(
    density=0.4,
    dense_loss=2.0,
    sale_loss=2.01,
    dense_recall=1.0,
    sale_recall=0.975,
    dense_seconds=1.0,
    sale_seconds=2.0,
    tokens=256,
    notes=40,
    device="cpu",
    device_name="some CPU",
    dtype="float32",
    config={"rule": {"name": "mass", "threshold": 0.004}, "block_size": [64, 64]},
    path="flex_attention",
    head_density=[[0.25, 0.5], [0.75, 1.0]],
    versions={},
)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(PACKAGED / "tokenizer.json"))


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A folder as the packaged one, of a tiny model that has learned nothing."""
    folder = tmp_path_factory.mktemp("random-model")
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=2816,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_prompt_has_every_note_and_later_its_recall(tokenizer: Tokenizer) -> None:
    prompt = build_prompt(tokenizer, held_out_texts(), tokens=4000, notes=30, seed=3)
    assert len(prompt.tokens) == 4000
    assert prompt.tokens[0] == BOS
    assert prompt.tokens.count(BOS) == 1
    text = tokenizer.decode(prompt.tokens[1:], skip_special_tokens=False)
    lines = [match.groups() for match in LINE.finditer(text)]
    notes = [line[1:] for line in lines if line[0] == "note"]
    assert len(set(notes)) == 30
    assert sorted(notes) == sorted(line[1:] for line in lines if line[0] == "recall")
    assert [kind for kind, *_ in lines] == ["note"] * 30 + ["recall"] * 30
    assert text.splitlines()[-1].startswith("# recall")
    values = dict(notes)
    for begin, (start, stop) in zip(prompt.notes, prompt.recalls, strict=True):
        assert begin < start
        _, key, value = LINE.search(tokenizer.decode(prompt.tokens[begin : begin + 32])).groups()
        assert values[key] == value == tokenizer.decode(prompt.tokens[start:stop]).strip()


def test_prompt_tokens_are_those_of_its_text(tokenizer: Tokenizer) -> None:
    tokens = build_prompt(tokenizer, held_out_texts(), tokens=4000, seed=1).tokens[1:]
    assert tokenizer.encode(tokenizer.decode(tokens, skip_special_tokens=False)).ids == tokens


def test_prompt_depends_on_its_seed_alone(tokenizer: Tokenizer) -> None:
    texts = held_out_texts()
    prompts = [build_prompt(tokenizer, texts, tokens=3000, seed=seed) for seed in (5, 5, 6)]
    assert prompts[0] == prompts[1] != prompts[2]


def test_prompt_says_which_lengths_do_not_work(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"a third of the prompt.*tokens=1500"):
        build_prompt(tokenizer, held_out_texts(), tokens=1500)
    with pytest.raises(ValueError, match="must not exceed the text"):
        build_prompt(tokenizer, ["pass\n" * 100], tokens=8192)


def test_text_comes_from_held_out_modules(tmp_path: Path) -> None:
    assert len(held_out_texts()) == len(HELD_OUT)
    with pytest.raises(FileNotFoundError, match=r"argparse\.py.*ships its sources"):
        held_out_texts(tmp_path)
    (tmp_path / "shlex.py").write_text("import os\n")
    assert held_out_texts(tmp_path) == ["import os\n"]


def test_score_counts_a_recall_only_if_every_value_token_is_right(tokenizer: Tokenizer) -> None:
    prompt = build_prompt(tokenizer, held_out_texts(), tokens=2000, notes=10)
    logits = torch.zeros(2000, tokenizer.get_vocab_size())
    logits[torch.arange(1999), torch.tensor(prompt.tokens[1:])] = 100.0
    perfect = score(logits, prompt)
    assert perfect.recall == 1.0
    assert perfect.loss < 1e-6
    _, stop = prompt.recalls[4]
    logits[stop - 2] = torch.eye(len(logits[0]))[BOS]  # the last of its tokens
    logits[stop - 1] = torch.eye(len(logits[0]))[BOS]  # what follows is no longer the value
    assert score(logits, prompt).recall == 0.9


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        ({}, []),
        ({"sale_recall": 0.95}, []),
        ({"sale_recall": 0.925}, ["SALE's recall is 0.925, more than 0.05 below"]),
        ({"dense_recall": 0.925, "sale_recall": 0.925}, ["dense recall is 0.925, below 0.95"]),
        ({"density": 0.6}, []),
        ({"density": 0.61}, ["density is 0.610, above 0.6"]),
    ],
)
def test_problems_are_those_of_recall_and_density(change: dict[str, float], reasons: list[str]) -> None:
    problems = dataclasses.replace(GOOD, **change).problems()
    assert len(problems) == len(reasons)
    assert all(reason in problem for reason, problem in zip(reasons, problems, strict=True))


@pytest.mark.parametrize("rich", [True, False])
def test_table_shows_the_figures(monkeypatch: pytest.MonkeyPatch, rich: bool) -> None:
    if rich:
        pytest.importorskip("rich")
    else:
        for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "rich", None)
    text = table.render(GOOD)
    for figure in ("0.400", "2.0000", "2.0100 (+0.0100)", "39 of 40 (0.975)", "threshold 0.004"):
        assert figure in text
    assert ("│" in text) == rich


def test_picture_has_a_map_per_head() -> None:
    maps = [torch.eye(4, dtype=torch.bool).expand(2, 4, 4)] * 2
    axes = picture.draw(maps, GOOD).axes
    assert [axis.get_title() for axis in axes] == ["0.25", "0.50", "0.75", "1.00"]
    shown = torch.tensor(axes[0].images[0].get_array())
    assert shown.tolist() == [[2, 0, 0, 0], [1, 2, 0, 0], [1, 1, 2, 0], [1, 1, 1, 2]]


def test_random_model_fails_the_task_and_says_so(
    random_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "kept.png"
    arguments = ["--model", str(random_model), "--tokens", "2816", "--threshold", "0.1"]
    status = main(["demo", *arguments, "--device", "cpu", "--plot", str(plot), "--json", "-"])
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report.keys() >= KEYS
    assert report["tokens"] == 2816
    assert report["device"] == "cpu"
    assert report["path"] == "flex_attention after 1024 dense rows"
    assert torch.tensor(report["head_density"]).shape == (2, 2)
    assert 0 < report["density"] < 1
    assert report["dense_seconds"] > 0 < report["sale_seconds"]
    assert report["loss_rise"] == report["sale_loss"] - report["dense_loss"]
    assert status == 1
    assert "dense recall is 0.000, below 0.95" in err
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--device", "tpu"], "device must be cpu"),
        (["--tokens", "9000"], r"tokens must be in \[2, 2816\]"),
        (["--threshold", "-1"], "threshold"),
        (["--model", "no-such-folder"], "no-such-folder has no config.json"),
    ],
)
def test_what_cannot_run_exits_2(
    random_model: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    reason: str,
) -> None:
    default = ["--model", str(random_model), "--tokens", "2600", "--device", "cpu", "--no-plot"]
    assert main(["demo", *default, *arguments]) == 2
    assert re.search(reason, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [("model", "transformers", "demo"), ("picture", "matplotlib", "viz")],
)
def test_missing_package_names_its_extra(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: str,
    package: str,
    extra: str,
) -> None:
    monkeypatch.delitem(sys.modules, f"sale_flex.demo.{module}", raising=False)
    monkeypatch.delitem(sys.modules, "sale_flex.demo.run", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["demo", "--plot", "kept.png"]) == 2
    assert f"pip install 'sale-flex[{extra}]'" in capsys.readouterr().err


def test_importing_the_demo_imports_nothing_optional() -> None:
    code = (
        "import sys, sale_flex.demo\n"
        "print(sorted({'transformers', 'tokenizers', 'matplotlib', 'rich'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_packaged_model_recalls_with_sale(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["demo", "--device", device, "--no-plot", "--json", "-"])
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert (status, err) == (0, "")
    assert report["tokens"] == 8192
    assert report["dense_recall"] >= 0.95
    assert report["sale_recall"] >= report["dense_recall"] - 0.05
    assert report["density"] <= 0.6
    assert abs(report["loss_rise"]) < 0.02


def test_packaged_model_is_small() -> None:
    assert sum(path.stat().st_size for path in PACKAGED.iterdir()) < 8_000_000


def test_training_sequences_ask_for_what_was_noted(tokenizer: Tokenizer) -> None:
    path = Path(__file__).resolve().parents[2] / "examples" / "train_recall_lm.py"
    spec = importlib.util.spec_from_file_location("train_recall_lm", path)
    training = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(training)
    batches = training.Batches(tokenizer, held_out_texts(), "cpu", seed=0, pool=1 << 14, noted=1.0)
    tokens, weights = batches(4, 1024)
    assert tokens.shape == weights.shape == (4, 1024)
    for row, weight in zip(tokens, weights, strict=True):
        assert row[0] == BOS
        text = tokenizer.decode(row[1:].tolist(), skip_special_tokens=False)
        assert tokenizer.encode(text).ids == row[1:].tolist()
        noted: dict[str, str] = {}
        asked = []
        for kind, key, value in LINE.findall(text):
            if kind == "note":
                noted[key] = value
            else:
                assert noted[key] == value
                asked.append(value)
        heavy = row[weight == training.VALUE_WEIGHT].tolist()
        assert tokenizer.decode(heavy).split() == "".join(f" {value}" for value in asked).split()
