# SPDX-License-Identifier: BSD-3-Clause
"""`sale-flex calibrate` and `sale-flex inspect`: what they print, write and refuse; and the example."""

import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from sale_flex import Calibration, Mass, Relative, SaleConfig
from sale_flex._console.stored import stored_config
from sale_flex.calibration.artefact import CONFIG
from sale_flex.calibration.command import read_texts
from sale_flex.cli import main
from sale_flex.demo.model import PACKAGED
from sale_flex.demo.prompt import HELD_OUT, standard_library

pytestmark = pytest.mark.usefixtures("uncompiled_attention")

OPTIONS = ["--min-length", "64", "--target", "0.2", "--device", "cpu"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for name in HELD_OUT[:2]:
        (folder / f"{name}.py").write_text((standard_library() / f"{name}.py").read_text("utf-8"), "utf-8")
    return folder


def calibrate(text: Path, out: Path, *arguments: str) -> int:
    texts = [str(text / f"{HELD_OUT[0]}.py")]
    given = ["--texts", *texts, "--lengths", "256,512", "--out", str(out), *OPTIONS, *arguments]
    return main(["calibrate", str(PACKAGED), *given])


@pytest.fixture(scope="module")
def done(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a calibration."""
    out = tmp_path_factory.mktemp("out")
    assert calibrate(text, out, "--transfer", str(text), "--json", str(out.parent / "calibrate.json")) == 0
    return out


def test_calibrate_writes_what_its_json_says(done):
    calibration = Calibration.from_pretrained(done)
    assert [text.shape for text in calibration.on.texts] == [(1, 256), (1, 512)]
    assert calibration.transfer is not None
    assert (calibration.errors <= 0.2).all()
    assert (calibration.config.min_length, calibration.goal.target) == (64, 0.2)
    assert (calibration.dtype, calibration.device) == ("float32", "cpu")
    stored = json.loads((done.parent / "calibrate.json").read_text())
    assert stored["thresholds"] == calibration.thresholds.tolist()
    assert stored["on"]["errors"] == calibration.errors.tolist()
    assert stored["transfer"]["densities"] == calibration.transfer.densities.tolist()


def test_calibrate_goes_on(done, text, capsys):
    assert calibrate(text, done, "--resume") == 0
    captured = capsys.readouterr()
    assert "layer 0" not in captured.err  # nothing was left to do
    assert "heads dense" in captured.out
    assert f"sale-flex inspect {done}" in captured.out
    assert calibrate(text, done, "--resume", "--error", "absolute") == 2
    assert "error is 'relative' there and 'absolute' here" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["relative", "file"])
def test_calibrate_takes_a_config(text, tmp_path, given):
    config = SaleConfig(Relative(), min_length=64)
    if given == "file":
        config = SaleConfig(Mass.fast(sub_block=16), min_length=64, sink_tokens=16)
        given = str(tmp_path / "config.json")
        Path(given).write_text(json.dumps(stored_config(config, threshold=True)))
    arguments = ["--config", given, "--block-size", "64,32", "--lengths", "128"]
    assert calibrate(text, tmp_path / "out", *arguments) == 0
    found = Calibration.from_pretrained(tmp_path / "out").config
    assert found == replace(config, block_size=(64, 32)).with_threshold(found.rule.threshold)


def test_the_min_length_of_a_config_stays(text, tmp_path, monkeypatch):
    seen = []

    def stop(*_, config: SaleConfig, **__):
        seen.append(config.min_length)
        raise ValueError("seen")

    monkeypatch.setattr("sale_flex.calibration.run.calibrate", stop)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"min_length": 96}))
    arguments = ["calibrate", str(PACKAGED), "--texts", str(text), "--lengths", "128", "--config", str(file)]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert main([*arguments, "--out", str(tmp_path / "out"), "--min-length", "64"]) == 2
    assert seen == [96, 64]


def test_calibrate_says_how_to_go_on(text, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sale_flex.calibration.work.find_thresholds", interrupted)
    assert calibrate(text, tmp_path) == 130
    assert "interrupted; the same command with --resume goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "1"], "--lengths"),
        (["--lengths", "100000"], "--lengths must be at most 8192 tokens"),
        (["--target", "0"], "target must be above 0"),
        (["--min-length", "-1"], "min_length must be at least 0"),
        (["--config", "slow"], "--config must be a JSON file or one of default, fast, relative, got 'slow'"),
        (["--config", "no-such.json"], "no-such.json"),
        (["--block-size", "65,64"], "--block-size must be"),
        (["--texts", "no-such-file"], "no-such-file is not there"),
        (["--transfer", "no-such-file"], "no-such-file is not there"),
    ],
)
def test_calibrate_refuses(text, tmp_path, capsys, arguments, message):
    assert calibrate(text, tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_nowhere(text, tmp_path, capsys):
    arguments = ["--texts", str(text), "--lengths", "64", "--out", str(tmp_path / "out")]
    assert main(["calibrate", str(tmp_path / "no-such-model"), *arguments]) == 2
    assert "no-such-model is no folder" in capsys.readouterr().err


def test_a_text_that_is_too_short(tmp_path, capsys):
    (tmp_path / "short.txt").write_text("Hello.")
    assert calibrate(tmp_path, tmp_path / "out", "--texts", str(tmp_path / "short.txt")) == 2
    assert "short.txt: --texts has only 6 bytes, and --lengths asks for 512" in capsys.readouterr().err


def test_texts_begin_with_the_first_token(text):
    class Tokenizer:
        bos_token_id = 7

        def __call__(self, string, add_special_tokens):
            assert not add_special_tokens
            return type("Encoded", (), {"input_ids": list(range(len(string)))})

    class Model:
        class config:
            @staticmethod
            def get_text_config():
                return type("Config", (), {"max_position_embeddings": 99, "bos_token_id": 3})

    found = read_texts("--texts", [text, text / f"{HELD_OUT[1]}.py"], [5, 3], Model, Tokenizer())
    assert [each.tolist() for each in found] == [[[7, 0, 1, 2, 3]], [[7, 0, 1]]] * 2


def test_inspect_prints_tables(done, capsys):
    assert main(["inspect", str(done)]) == 0
    out = capsys.readouterr().out
    for title in ("thresholds", "densities", "relative errors", "on texts of another kind (there)"):
        assert f"\n{title}" in f"\n{out}"
    for column in ("layer", "head 0", "head 3", "smallest", "largest", "mean"):
        assert f" {column} " in out
    assert "rise" in out
    assert str(Calibration.from_pretrained(done)) in out


def test_inspect_without_rich(done, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["inspect", str(done)]) == 0
    lines = capsys.readouterr().out.splitlines()
    calibration = Calibration.from_pretrained(done)
    row = lines[lines.index("densities") + 2].split()
    assert row[:5] == ["0", *(f"{density:.2f}" for density in calibration.densities[0].tolist())]


def test_inspect_as_json_and_drawn(done, capsys, tmp_path):
    assert main(["inspect", str(done), "--json", "-", "--plot", str(tmp_path / "plot.png")]) == 0
    captured = capsys.readouterr()
    stored = json.loads(captured.out)
    assert stored["thresholds"] == Calibration.from_pretrained(done).thresholds.tolist()
    assert stored["on"]["loss_dense"] == Calibration.from_pretrained(done).on.loss_dense
    pixels = torch.from_numpy(imread(tmp_path / "plot.png"))
    assert len(pixels.flatten(0, 1).unique(dim=0)) > 16
    assert captured.err == f"Plot: {tmp_path / 'plot.png'}\n"


def test_inspect_draws_dense_heads(tmp_path, done):
    from sale_flex.calibration.plot import draw

    calibration = Calibration.from_pretrained(done)
    calibration.thresholds[1] = 0
    axes = draw(calibration).axes
    assert [axis.get_title() for axis in axes[:3]] == ["threshold", "density", "relative error"]
    assert axes[0].images[0].get_array().mask.tolist() == [[layer == 1] * 4 for layer in range(4)]


@pytest.mark.parametrize("command", ["calibrate", "inspect"])
def test_help_imports_nothing_optional(command):
    code = (
        "import sys\n"
        "from sale_flex.cli import main\n"
        f"try: main([{command!r}, '--help'])\n"
        "except SystemExit:\n"
        "    print(sorted({'transformers', 'safetensors', 'matplotlib', 'rich', 'triton', 'huggingface_hub'} "
        "& set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"usage: sale-flex {command}" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is no folder"),
        (["."], "has no config.json"),
        (["FOLDER", "--plot", "no/such/folder/plot.png"], "--plot no/such/folder/plot.png is in no folder"),
    ],
)
def test_inspect_refuses(done, capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    arguments = [str(done) if argument == "FOLDER" else argument for argument in arguments]
    assert main(["inspect", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_inspect_refuses_other_formats(done, capsys, tmp_path):
    (tmp_path / CONFIG).write_text('{"format": 0}')
    assert main(["inspect", str(tmp_path)]) == 2
    assert "must be of format 2, got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "package", "extra"),
    [
        (["calibrate", "m", "--texts", ".", "--out", "o"], "safetensors", "hf"),
        (["calibrate", "m", "--texts", ".", "--out", "o"], "transformers", "hf"),
        (["inspect", "FOLDER"], "safetensors", "hf"),
        (["inspect", "FOLDER", "--plot", "p.png"], "matplotlib", "viz"),
        (["inspect", "owner/name"], "huggingface_hub", "hf"),
    ],
)
def test_missing_package_names_its_extra(monkeypatch, capsys, done, arguments, package, extra):
    ours = ("sale_flex.bench.model", "sale_flex.calibration.plot")
    for name in [name for name in sys.modules if name.partition(".")[0] == package or name in ours]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert main([str(done) if argument == "FOLDER" else argument for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert f"needs {package}, which is not installed: pip install 'sale-flex[{extra}]'" in err


def test_the_example(capsys):
    example = runpy.run_path(str(Path(__file__).resolve().parents[2] / "examples" / "calibrate.py"))
    assert example["main"](["--length", "512", "--target", "0.1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Calibration of ")
    assert lines[-1].startswith("512 tokens: thresholds for 16 heads in ")


def test_the_example_notices_what_is_wrong(capsys, monkeypatch):
    example = runpy.run_path(str(Path(__file__).resolve().parents[2] / "examples" / "calibrate.py"))
    monkeypatch.setattr("sale_flex.calibration.work.find_thresholds", lambda call, goal: torch.zeros(call.heads))
    assert example["main"](["--length", "512"]) == 1
    assert "no block was left out" in capsys.readouterr().err
