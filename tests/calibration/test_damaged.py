# SPDX-License-Identifier: BSD-3-Clause
"""Files of a calibration that somebody edited: they load, or a ValueError names the file and the field."""

import json
from pathlib import Path

import pytest
import torch
from damage_harness import complaint, damages, named, places, replaced
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sale_flex import Calibration, Mass, SaleConfig
from sale_flex._console.stored import stored_config
from sale_flex.calibration import Evaluation, Text
from sale_flex.calibration.goal import Goal
from sale_flex.calibration.record import RECORD, Record

TEXTS = (Text("ab" * 32, (1, 512), 511, 2.5, 2.75), Text("cd" * 32, (2, 256), 100, 1.0, 1.5))
HASHES = {part: {"bfloat16": "0" * 32, "float16": "1" * 32} for part in ("decoder", "head")}


def calibration() -> Calibration:
    on, transfer = (Evaluation(torch.full((2, 3), 0.125), torch.full((2, 3), 0.5), TEXTS) for _ in range(2))
    return Calibration(
        config=SaleConfig(Mass(max_blocks=99), min_length=128),
        thresholds=torch.tensor([[0.25, 0.0, 1.0], [0.0, 0.0, 0.0]]),
        layers=(0, 3),
        goal=Goal(0.05),
        on=on,
        model="a/model",
        revision="0123abcd",
        unused=(3,),
        transfer=transfer,
        versions={"torch": "2.0"},
        weights=HASHES,
    )


STORED = calibration().to_dict()
DERIVED = {"dense_heads", "loss_dense", "loss_sparse", "error_mean", "error_largest", "density"}
"""What is written for people, beside what it follows from."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration")
    calibration().save_pretrained(folder)
    return folder


def use(found: Calibration) -> None:
    """What is done with a calibration that was read."""
    str(found)
    json.dumps(found.to_dict())
    for layer in found.layers:
        found.layer_config(layer)


def load(folder: Path, content: object) -> None:
    (folder / "config.json").write_text(json.dumps(content))
    use(Calibration.from_pretrained(folder))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damaged=damages(STORED))
def test_a_damaged_config(folder, damaged):
    path, _, content = damaged
    message = complaint(lambda: load(folder, content))
    assert message is None or (str(folder) in message and named(path, message)), (path, message)


@pytest.mark.parametrize("path", [path for path in places(STORED) if path], ids=lambda path: ".".join(map(str, path)))
def test_no_field_can_hold_just_anything(folder, path):
    if str(path[-1]) in DERIVED and path[:-1] in ((), ("on",), ("transfer",)):
        return
    (folder / "config.json").write_text(json.dumps(replaced(STORED, path, [{"some": ["thing"]}])))
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        Calibration.from_pretrained(folder)
    assert named(path, str(caught.value))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("on", "texts"), [], "on.texts must be a list of 1 or more, got []"),
        (("on", "texts", 0, "targets"), 0, "on.texts[0].targets must be an integer, 1 or more, got 0"),
        (("on", "texts", 1, "loss_dense"), "low", "on.texts[1].loss_dense must be a number, got 'low'"),
        (("target",), "0.05", "target must be a number above 0, got '0.05'"),
        (("layers",), [3, 0], "layers must ascend, each layer once, got [3, 0]"),
        (("unused",), [2], "unused must be among the layers, got [2]"),
        (("config", "rule", "bits"), 4.0, "config.rule.bits must be one of (4, 8), got 4.0"),
        (("config", "block_size"), [65, 64], "config.block_size must be (query rows, keys)"),
        (("transfer",), 1, "transfer must be null or a JSON object, got 1"),
    ],
)
def test_what_is_said(folder, path, value, message):
    (folder / "config.json").write_text(json.dumps(replaced(STORED, path, value)))
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        Calibration.from_pretrained(folder)
    assert message in str(caught.value)
    assert "calibrate again" in str(caught.value)


def test_a_file_without_hashes_loads(folder):
    (folder / "config.json").write_text(json.dumps({name: x for name, x in STORED.items() if name != "weights"}))
    assert Calibration.from_pretrained(folder).weights is None
    (folder / "config.json").write_text(json.dumps(STORED))
    assert Calibration.from_pretrained(folder).weights == HASHES


TENSORS = (
    None,
    torch.zeros(2, 3).double(),
    torch.zeros(2, 3).int(),
    torch.zeros(3, 2),
    torch.zeros(0, 3),
    torch.zeros(()),
    *(torch.full((2, 3), value) for value in (-1.0, torch.nan, torch.inf)),
)
NAMES = ["thresholds", "errors", "densities", "transfer_errors", "transfer_densities"]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(NAMES),
    tensor=st.sampled_from(TENSORS),
)
def test_damaged_tensors(folder, name, tensor):
    path = folder / "thresholds.safetensors"
    before = path.read_bytes()
    tensors = load_file(path)
    tensors.pop(name)
    save_file(tensors | ({} if tensor is None else {name: tensor}), path)
    message = complaint(lambda: load(folder, STORED))
    path.write_bytes(before)
    if message is None:
        assert name != "thresholds"
        assert tensor.shape == (2, 3)
    else:
        assert str(path) in message
        assert name in message


SETTINGS = {
    "model": "a/model", "layers": [0, 3], "heads": 3, "config": stored_config(SaleConfig()), "target": 0.05,
    "weights": HASHES, "texts": ["ab" * 32, "cd" * 32],
}  # fmt: skip
MEASURED = {"thresholds": [0.5, 0.0, 1.0], "errors": [0.1, 0.2, 0.3], "kept": [1, 2, 3], "visible": [4, 5, 6]}
PROGRESS = {
    "settings": SETTINGS,
    "found": [{"0": [0.5, 0.0, 1.0], "3": None}, {"0": [0.5, 0.0, 1.0]}],
    "measured": [{"0": MEASURED, "3": MEASURED}, {}],
    "losses": [[2.5, 2.75, 511], []],
}


def resume(folder: Path, content: object) -> Record:
    (folder / RECORD).write_text(json.dumps(content))
    return Record(folder, RECORD, SETTINGS, 2, resume=True)


def test_progress_comes_back(tmp_path):
    record = resume(tmp_path, PROGRESS)
    assert (record.found, record.measured, record.losses) == tuple(
        PROGRESS[name] for name in ("found", "measured", "losses")
    )
    assert json.loads((tmp_path / RECORD).read_text()) == PROGRESS


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damaged=damages(PROGRESS))
def test_damaged_progress(tmp_path_factory, damaged):
    path, _, content = damaged
    folder = tmp_path_factory.mktemp("progress")
    records: list[Record] = []
    message = complaint(lambda: records.append(resume(folder, content)))
    assert message is None or (str(folder) in message and named(path, message)), (path, message)
    for record in records:
        for found, measured, losses in zip(record.found, record.measured, record.losses):
            known = [torch.tensor(x) for x in (*found.values(), *(x["thresholds"] for x in measured.values())) if x]
            assert all(len(x) == 3 for x in known)
            assert len(losses) in (0, 3)


@pytest.mark.parametrize("path", [path for path in places(PROGRESS) if path], ids=lambda path: ".".join(map(str, path)))
def test_no_field_of_progress_can_hold_just_anything(tmp_path, path):
    with pytest.raises(ValueError, match=str(tmp_path)) as caught:
        resume(tmp_path, replaced(PROGRESS, path, [{"some": ["thing"]}]))
    assert named(path, str(caught.value))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("found",), [], "found must be a list of 2, got []"),
        (("found", 0, "0"), [0.5, "x", 1.0], "found[0].0[1] must be a number, 0 or more and finite, got 'x'"),
        (("found", 0), {"1": None}, "the names in found[0] must be among 0, 3, got '1'"),
        (("losses", 0), [2.5, 2.75, 0], "losses[0][2] must be an integer, 1 or more, got 0"),
        (("measured", 0, "0"), {"errors": [1, 2, 3]}, "'kept', 'thresholds', 'visible' missing in measured[0].0"),
        (("settings", "weights", "head", "float16"), "2" * 32, "the model's weights are others than those there"),
        (("settings", "weights"), None, "the model's weights are others than those there"),
    ],
)
def test_what_is_said_of_progress(tmp_path, path, value, message):
    with pytest.raises(ValueError, match=str(tmp_path)) as caught:
        resume(tmp_path, replaced(PROGRESS, path, value))
    assert message in str(caught.value)
