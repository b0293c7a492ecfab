# SPDX-License-Identifier: BSD-3-Clause
"""`calibrate` and `capture` find out what is cheap to find out before they read a model, and take text alone."""

import gzip
import importlib
import json
import os
from pathlib import Path

import pytest

pytest.importorskip("transformers")
from cli_flags import FLAG, flags_of

from sale_flex import cli
from sale_flex.bench import model as models
from sale_flex.bench.model import check_bytes, read_text, text_files
from sale_flex.demo.model import PACKAGED

PROSE = "Nothing of any interest happens in these words, which go on and on.\n" * 100


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_text(PROSE)
    return path


def command(name: str, text: Path, out: Path, *more: str, model: str = str(PACKAGED)) -> list[str]:
    """Arguments that are right, and `more` of them."""
    if name == "calibrate":
        given = ["--texts", str(text), "--lengths", "128", "--out", str(out)]
    else:
        given = ["--text", str(text), "--length", "128", "--layers", "0", "--out", str(out)]
    return [name, model, *given, "--device", "cpu", *more]


@pytest.fixture
def untouched(monkeypatch):
    """What reads a model's config and tokenizer, or its weights, fails the test."""
    for name in ("find", "load"):
        monkeypatch.setattr(models, name, lambda *_, name=name: pytest.fail(f"{name} was called"))


@pytest.fixture
def weightless(monkeypatch):
    """What reads a model's weights fails the test."""
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("the weights were read"))


def refused(capsys, arguments: list[str]) -> str:
    """The message with which a command refuses; it names no flag that the command lacks."""
    assert cli.main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"sale-flex {arguments[0]}: ")
    assert message.count("\n") == 1
    assert set(FLAG.findall(message)) <= flags_of(arguments[0]), message
    return message


BINARIES = {
    "nul": b"some text\0and more of it\n" * 200,
    "latin-1": "d\xe9j\xe0 vu, encore et encore\n".encode("latin-1") * 200,
    "utf-16": PROSE.encode("utf-16"),
    "utf-16 without a mark": PROSE.encode("utf-16-le"),
    "png": b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 20,
    "gzip": gzip.compress(os.urandom(5000)),
    "cut in a letter": (PROSE + "é").encode()[:-1],
}


@pytest.mark.parametrize("kind", BINARIES)
@pytest.mark.parametrize("place", ["file", "folder"])
@pytest.mark.parametrize(
    ("name", "option"), [("calibrate", "--texts"), ("calibrate", "--transfer"), ("capture", "--text")]
)
def test_what_is_no_text_is_refused(text, tmp_path, capsys, untouched, name, option, kind, place):
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / ("image.txt" if place == "folder" else "image.bin")
    path.write_bytes(BINARIES[kind])
    given = folder if place == "folder" else path
    message = refused(capsys, command(name, text, tmp_path / "out", option, str(given)))
    assert str(path) in message
    assert "must be text" in message
    assert "leave it out" in message
    assert not (tmp_path / "out").exists()


def test_what_is_no_text_is_refused_wherever_it_comes(text, tmp_path, capsys, weightless):
    # The first file may have enough bytes and too few tokens, so that only the tokenizer needs the second.
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("words " * 30)
    (folder / "b.txt").write_bytes(BINARIES["nul"])
    for name, option in (("calibrate", "--texts"), ("capture", "--text")):
        assert str(folder / "b.txt") in refused(capsys, command(name, text, tmp_path / "out", option, str(folder)))


def test_text_is_taken_as_it_is(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffdéjà vu \U0001f600\r\n\x07".encode())
    assert read_text(path) == "\ufeffdéjà vu \U0001f600\n\x07"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--texts", "no-such-file"], "--texts no-such-file is not there"),
        (["--transfer", "no-such-file"], "--transfer no-such-file is not there"),
        (["--texts", "EMPTY"], "--texts holds no file that ends in .md"),
        (["--texts", "SHORT"], "--texts has only 6 bytes, and --lengths asks for 128"),
        (["--transfer", "SHORT"], "--transfer has only 6 bytes, and --lengths asks for 128"),
        (["--texts", "PIPE"], "must be a file or a folder, got a pipe or a device"),
        (["--lengths", "x"], "--lengths must be numbers of tokens"),
        (["--target", "nan"], "target must be above 0 and finite, got nan"),
        (["--target", "0"], "target must be above 0 and finite, got 0.0"),
        (["--min-length", "-1"], "min_length must be at least 0"),
        (["--out", "SHORT"], "must be a folder"),
        (["--out", "SHORT/inside/it"], "must be a folder"),
        (["--out", "DANGLING"], "must be a folder"),
        (["--out", "FINISHED"], "holds a config.json already"),
        (["--out", "INTERRUPTED"], "holds an interrupted calibration"),
        (["--device", "tpu"], "--device must be cpu"),
        (["--json", "no/such/folder.json"], "--json no/such/folder.json is in no folder"),
        (["--json", "EMPTY"], "must be a file, got a folder"),
    ],
)
def test_calibrate_looks_at_everything_before_the_model(text, tmp_path, capsys, untouched, more, message):
    check_refusal("calibrate", text, tmp_path, capsys, more, message)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--text", "no-such-file"], "--text no-such-file is not there"),
        (["--text", "EMPTY"], "--text holds no file that ends in .md"),
        (["--text", "SHORT"], "--text has only 6 bytes, and --length asks for 128"),
        (["--text", "PIPE"], "must be a file or a folder, got a pipe or a device"),
        (["--layers", "x"], "--layers must be layers, 0 or more"),
        (["--length", "0"], "--length must be 1 or more"),
        (["--out", "EMPTY"], "--out"),
        (["--out", "SHORT/inside"], "is in no folder there is"),
        (["--device", "tpu"], "--device must be cpu"),
        (["--json", "no/such/folder.json"], "--json no/such/folder.json is in no folder"),
    ],
)
def test_capture_looks_at_everything_before_the_model(text, tmp_path, capsys, untouched, more, message):
    check_refusal("capture", text, tmp_path, capsys, more, message)


def check_refusal(name: str, text: Path, tmp_path: Path, capsys, more: list[str], message: str) -> None:
    places = {name: tmp_path / name for name in ("EMPTY", "SHORT", "PIPE", "DANGLING", "FINISHED", "INTERRUPTED")}
    for folder in ("EMPTY", "FINISHED", "INTERRUPTED"):
        places[folder].mkdir()
    places["SHORT"].write_text("Hello.")
    os.mkfifo(places["PIPE"])
    places["DANGLING"].symlink_to(tmp_path / "gone")
    (places["FINISHED"] / "config.json").write_text("{}")
    (places["INTERRUPTED"] / "progress.json").write_text("{}")
    given = [str(tmp_path / part) if part.partition("/")[0] in places else part for part in more]
    before = sorted(tmp_path.rglob("*"))
    assert message in refused(capsys, command(name, text, tmp_path / "out", *given))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["calibrate", "capture"])
def test_a_folder_that_can_not_be_written_is_refused(text, tmp_path, capsys, untouched, monkeypatch, name):
    # Permissions do not stop root, so that is told by what the system says.
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and allowed(path, mode))
    assert "can not be written" in refused(capsys, command(name, text, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("calibrate", ["--lengths", "100000"], "--lengths must be at most 8192 tokens"),
        ("calibrate", ["--lengths", "4096"], "tokens, and --lengths asks for 4096; add text"),
        ("capture", ["--length", "4096"], "tokens, and --length asks for 4096; add text"),
        ("capture", ["--layers", "4"], "--layers must be in [0, 4), which are the model's, got 4"),
    ],
)
def test_what_the_config_and_the_tokenizer_tell_comes_before_the_weights(
    tmp_path, capsys, weightless, name, more, message
):
    text = tmp_path / "text.txt"
    text.write_text("word " * (500 if "100000" not in more else 30000))
    assert message in refused(capsys, command(name, text, tmp_path / "out", *more))


def test_a_short_text_is_only_refused_by_its_bytes_if_no_tokenizer_could_help(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("\ufdfa" * 10)  # a letter of three bytes that normalisation makes 33
    check_bytes([path], 330)
    with pytest.raises(ValueError, match="--text has only 30 bytes, and --length asks for 340; add text"):
        check_bytes([path], 340)


def test_paths_are_named_by_their_option(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--prose .* is not there"):
        text_files([tmp_path / "none"], "--prose")


@pytest.mark.parametrize("name", ["info", "demo", "bench", "inspect"])
def test_json_that_can_not_be_written_is_refused_at_once(tmp_path, capsys, monkeypatch, name):
    module = importlib.import_module(cli._COMMANDS[name][0])
    monkeypatch.setattr(module, "main", lambda _: pytest.fail("it ran"))
    more = ["some/folder"] if name == "inspect" else []
    path = tmp_path / "missing" / "result.json"
    assert f"--json {path} is in no folder there is" in refused(capsys, [name, *more, "--json", str(path)])


def test_json_goes_where_it_can(tmp_path, capsys):
    for path in (tmp_path / "new.json", tmp_path / "new.json", Path("/dev/null")):
        assert cli.main(["info", "--json", str(path)]) == 0
    assert json.loads((tmp_path / "new.json").read_text())["versions"]
