# SPDX-License-Identifier: BSD-3-Clause
"""`sale-flex capture`: that its file holds what attention gets, and that bench reads it."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

pytest.importorskip("transformers")
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from sale_flex.bench.captured import Captured, read_captured, write_captured
from sale_flex.bench.model import NAME, capture
from sale_flex.cli import main
from sale_flex.demo.model import PACKAGED

SIZES = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}


def save(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PACKAGED / name, folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model and a tokenizer."""
    torch.manual_seed(0)
    return save(LlamaForCausalLM(LlamaConfig(**SIZES)), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.py").write_text("def f(x):\n    return x + 1\n" * 40)
    (folder / "b.md").write_text("Some words about nothing.\n" * 40)
    (folder / "c.bin").write_bytes(b"\x00\xff" * 100)
    return folder


def run(model: Path, text: Path, out: Path, *arguments: str) -> int:
    base = ["--text", str(text), "--length", "300", "--layers", "0,2", "--out", str(out), "--device", "cpu"]
    return main(["capture", str(model), *base, *arguments])


def test_the_file_holds_what_attention_gets(llama, text, tmp_path, capsys):
    out = tmp_path / "qkv.safetensors"
    assert run(llama, text, out) == 0
    assert "layers 0, 2 of" in capsys.readouterr().out
    with safe_open(out, framework="pt") as file:
        assert sorted(file.keys()) == sorted(f"layer{n}.{name}" for n in (0, 2) for name in ("query", "key", "value"))
        assert file.metadata() == {
            "model": str(llama),
            "length": "300",
            "dtype": "float32",
            "scale": repr(32**-0.5),
        }
    model = AutoModelForCausalLM.from_pretrained(llama)
    outputs = []
    model.model.layers[2].self_attn.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    from sale_flex.bench.model import load, read_tokens, text_files

    _, tokenizer = load(str(llama), torch.float32, torch.device("cpu"))
    tokens = read_tokens(tokenizer, text_files([text]), 300, tokenizer.bos_token_id)
    assert tokens.shape == (1, 300)
    with torch.no_grad():
        model(tokens)
    layer, captured = read_captured(out, 2)
    assert layer == 2
    assert captured.query.shape == (1, 4, 300, 32)
    assert captured.key.shape == captured.value.shape == (1, 2, 300, 32)
    attended = scaled_dot_product_attention(*captured[:3], is_causal=True, scale=captured.scale, enable_gqa=True)
    torch.testing.assert_close(attended.transpose(1, 2).reshape(1, 300, -1), outputs[0])


def test_the_model_is_left_as_it_was(llama):
    model = AutoModelForCausalLM.from_pretrained(llama)
    before = model.config._attn_implementation
    found = capture(model, torch.arange(70)[None], [1])
    assert list(found) == [1]
    assert model.config._attn_implementation == before != NAME


def test_json(llama, text, tmp_path, capsys):
    out = tmp_path / "qkv.safetensors"
    assert run(llama, text, out, "--dtype", "bfloat16", "--json", "-") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["layers"] == [0, 2]
    assert report["dtype"] == "bfloat16"
    assert report["shapes"]["query"] == [1, 4, 300, 32]


def test_bench_reads_it(llama, text, tmp_path, capsys, monkeypatch):
    out = tmp_path / "qkv.safetensors"
    assert run(llama, text, out) == 0
    capsys.readouterr()
    arguments = ["bench", "--qkv", str(out), "--device", "cpu", "--baselines", "sdpa", "--rounds", "1", "--json", "-"]
    # A call of the length of `min_length` is dense: nothing is compiled here.
    assert main([*arguments, "--lengths", "64,300"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["inputs"] for row in rows} == {f"{out}, layer 0"}
    assert {(row["length"], row["heads"], row["kv_heads"], row["head_dim"]) for row in rows} == {
        (64, 4, 2, 32),
        (300, 4, 2, 32),
    }
    assert {row["dtype"] for row in rows} == {"float32"}
    for wrong, reason in (
        (["--lengths", "301"], "--lengths must not exceed the 300 tokens in"),
        (["--lengths", "64", "--layer", "1"], "--layer must be one of those in"),
        (["--lengths", "64", "--heads", "8"], "--heads cannot be chosen with --qkv"),
        (["--lengths", "64", "--qkv", str(tmp_path / "none")], "none is not a file; `sale-flex capture` writes one"),
    ):
        assert main([*arguments, *wrong]) == 2
        assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--layers", "0,3"], "--layers must be in [0, 3), which are the model's, got 3"),
        (["--layers", "x"], "--layers must be layers, 0 or more"),
        (["--length", "100000"], "and --length asks for 100000; add text"),
        (["--length", "0"], "--length must be 1 or more"),
        (["--text", "no-such-file"], "--text no-such-file is not there"),
        (["--out", "no/such/folder.safetensors"], "is in no folder there is"),
        (["--device", "tpu"], "--device must be cpu"),
    ],
)
def test_bad_arguments(llama, text, tmp_path, capsys, arguments, reason):
    assert run(llama, text, tmp_path / "qkv.safetensors", *arguments) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "qkv.safetensors").exists()


def test_a_folder_without_a_model(text, tmp_path, capsys):
    assert run(tmp_path, text, tmp_path / "qkv.safetensors") == 2
    assert "sale-flex capture: " in capsys.readouterr().err


def test_a_sliding_window_is_no_prefix(text, tmp_path, capsys):
    model = save(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=128)), tmp_path / "mistral")
    assert run(model, text, tmp_path / "qkv.safetensors") == 2
    assert "layer 0 sees a sliding window of 128 tokens" in capsys.readouterr().err
    assert run(model, text, tmp_path / "qkv.safetensors", "--length", "100") == 0


def test_layers_of_different_scales_do_not_share_a_file(tmp_path):
    rows = torch.zeros(1, 1, 4, 32)
    layers = {layer: Captured(rows, rows, rows, scale) for layer, scale in ((0, 0.1), (1, 0.2))}
    with pytest.raises(ValueError, match="--layers must share one softmax scale"):
        write_captured(tmp_path / "qkv.safetensors", layers, "a model")


def test_files_of_something_else(tmp_path):
    path = tmp_path / "qkv.safetensors"
    path.write_text("no tensors")
    with pytest.raises(ValueError, match="is not a file of `sale-flex capture`"):
        read_captured(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="has no layers or no softmax scale"):
        read_captured(path)


@pytest.mark.parametrize(
    ("arguments", "module", "package"),
    [
        (["capture", "m", "--text", ".", "--layers", "0", "--length", "9", "--out", "f"], "model", "transformers"),
        (["bench", "--qkv", "qkv.safetensors"], "captured", "safetensors"),
    ],
)
def test_missing_package_names_its_extra(monkeypatch, capsys, arguments, module, package):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, f"sale_flex.bench.{module}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(arguments) == 2
    assert f"needs {package}, which is not installed: pip install 'sale-flex[bench]'" in capsys.readouterr().err
