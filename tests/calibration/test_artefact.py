# SPDX-License-Identifier: BSD-3-Clause
"""A calibration's files: what is in them, what comes back, and what is refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import sale_flex
from sale_flex import AuxRequest, Calibration, Mass, SaleConfig
from sale_flex.calibration import Evaluation, Text
from sale_flex.calibration.goal import Goal
from sale_flex.call.facts import EVERY_ROW

pytestmark = pytest.mark.usefixtures("uncompiled_attention")


def evaluation(layers: int = 3, heads: int = 4, seed: int = 0) -> Evaluation:
    generator = torch.Generator().manual_seed(seed)
    errors, densities = torch.rand(2, layers, heads, generator=generator)
    texts = (Text("ab" * 32, (1, 512), 511, 2.5, 2.75), Text("cd" * 32, (2, 256), 100, 1.0, 1.5))
    return Evaluation(errors, densities, texts)


def calibration(**fields) -> Calibration:
    thresholds = torch.tensor([[0.25, 0.0, 2**-14, 1.0], [0.0] * 4, [0.0] * 4])
    given = {
        "config": SaleConfig(Mass(pool=4, pool_mode="last", max_blocks=99), min_length=128, block_size=(128, 64)),
        "thresholds": thresholds,
        "layers": (0, 1, 3),
        "goal": Goal(0.05),
        "on": evaluation(),
        "model": "a/model",
        "revision": "0123abcd",
        "dtype": "bfloat16",
        "device": "cuda",
        "unused": (3,),
        "transfer": evaluation(seed=1),
        "versions": {"torch": "2.0"},
    }
    return Calibration(**given | fields)


def assert_same(one: Calibration, other: Calibration) -> None:
    assert one.to_dict() == other.to_dict()
    pairs = [(one, other)] + ([] if one.transfer is None else [(one.transfer, other.transfer)])
    for mine, theirs in pairs:
        for name in ("thresholds", "errors", "densities"):
            if hasattr(mine, name):
                assert torch.equal(getattr(mine, name), getattr(theirs, name))
                assert getattr(theirs, name).dtype == torch.float32


@pytest.mark.parametrize(
    "fields", [{}, {"transfer": None, "revision": None, "unused": (), "goal": Goal(2.0, "absolute", "halving")}]
)
def test_round_trip(tmp_path, fields):
    made = calibration(**fields)
    made.save_pretrained(tmp_path / "new" / "folder")
    read = Calibration.from_pretrained(tmp_path / "new" / "folder")
    assert_same(made, read)
    assert read.config == made.config.with_options(threshold=SaleConfig().rule.threshold)
    assert (read.goal, read.layers, read.unused) == (made.goal, made.layers, made.unused)
    assert read.on.texts == made.on.texts
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {"config.json", "thresholds.safetensors"}


def test_the_files_are_readable(tmp_path):
    calibration().save_pretrained(str(tmp_path))
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["format"] == 2
    assert stored["model"] == "a/model"
    assert (stored["layers"], stored["heads"], stored["dense_heads"], stored["unused"]) == ([0, 1, 3], 4, 5, [3])
    assert (stored["target"], stored["error"], stored["search"]) == (0.05, "relative", "bisection")
    assert stored["config"]["block_size"] == [128, 64]
    assert stored["config"]["rule"] == {
        "name": "mass", "pool": 4, "pool_mode": "last", "sub_block": 1, "bits": 8, "max_blocks": 99,
    }  # fmt: skip
    assert "threshold" not in stored["config"]
    assert stored["on"]["texts"][0] == {
        "sha256": "ab" * 32, "shape": [1, 512], "targets": 511, "loss_dense": 2.5, "loss_sparse": 2.75,
    }  # fmt: skip
    tensors = load_file(tmp_path / "thresholds.safetensors")
    assert set(tensors) == {"thresholds", "errors", "densities", "transfer_errors", "transfer_densities"}


def test_a_failed_save_leaves_the_old_files(tmp_path, monkeypatch):
    old = calibration()
    old.save_pretrained(tmp_path)
    new = calibration(thresholds=torch.ones(3, 4))
    monkeypatch.setattr("safetensors.torch.save", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        new.save_pretrained(tmp_path)
    assert_same(old, Calibration.from_pretrained(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2


def test_losses_are_weighed_by_tokens():
    on = evaluation()
    assert on.loss_dense == (511 * 2.5 + 100 * 1.0) / 611
    assert on.rise == pytest.approx((511 * 0.25 + 100 * 0.5) / 611, abs=1e-12)


def test_the_summary_says_what_matters():
    text = str(calibration())
    assert "a/model: 3 layers x 4 heads" in text
    assert "5 of 12 heads dense to meet it" in text
    assert "layers 3 dense, not calibrated" in text
    assert "rise +0.29" in text
    assert "texts of another kind" in text
    assert repr(calibration()) == text
    assert "thresholds" not in str(calibration(thresholds=torch.zeros(3, 4))).splitlines()[2]


def test_the_config_of_a_layer():
    made = calibration()
    config = made.layer_config(0)
    assert torch.equal(config.rule.threshold, made.thresholds[0])
    assert config == made.config.with_threshold(made.thresholds[0])
    assert torch.equal(made.layer_config(0, slice(2, 4), "cpu").rule.threshold, made.thresholds[0, 2:])
    dense = made.layer_config(3)
    assert (dense.min_length, dense.rule.threshold.tolist()) == (EVERY_ROW, [0.0] * 4)
    with pytest.raises(ValueError, match=r"layer must be one of the calibrated ones, 0-1, 3, got 2\."):
        made.layer_config(2)


def test_a_layer_runs():
    config = calibration().layer_config(0)
    query = torch.randn(1, 4, 300, 32)
    output, (_, stats) = sale_flex.sale_attention(query, query, query, config, return_aux=AuxRequest(stats=True))
    assert output.isfinite().all()
    assert stats.kept_blocks.shape == (1, 4)
    dense, wanted = calibration().layer_config(3), AuxRequest(stats=True)
    _, (_, stats) = sale_flex.sale_attention(query, query, query, dense, return_aux=wanted)
    assert stats.path is sale_flex.Path.DENSE_SDPA


def test_the_shape_has_to_fit():
    made = calibration()
    made.check_fits({0: 4, 1: 4, 3: 4})
    match = r"layers 0-1, 3 with 4 query heads \(a/model\), but the model has layers 0-2 with 8; calibrate this model"
    with pytest.raises(ValueError, match=match):
        made.check_fits({0: 8, 1: 8, 2: 8})
    with pytest.raises(ValueError, match=r"layers 0-1, 3 with 2 or 4"):
        made.check_fits({0: 4, 1: 4, 3: 2})
    with pytest.raises(ValueError, match=r"layers 0-1 with 4"):
        made.check_fits({0: 4, 1: 4})


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"thresholds": torch.zeros(2, 4)}, r"thresholds must have shape \[3, heads\].*got \[2, 4\]"),
        ({"thresholds": torch.zeros(4)}, r"thresholds must have shape \[3, heads\]"),
        ({"thresholds": -torch.ones(3, 4)}, "thresholds must be 0 or more"),
        ({"thresholds": torch.full((3, 4), torch.nan)}, "thresholds must be 0 or more and finite"),
        ({"on": evaluation(2)}, r"errors must have the thresholds' shape \[3, 4\], got \[2, 4\]"),
        ({"transfer": evaluation(3, 5)}, r"transfer_errors must have the thresholds' shape"),
    ],
)
def test_tensors_that_do_not_fit(fields, match):
    with pytest.raises(ValueError, match=match):
        calibration(**fields)


def change(folder, **fields):
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | fields))


@pytest.mark.parametrize(
    ("spoil", "error", "match"),
    [
        (lambda folder: change(folder, format=1), ValueError, "must be of format 2, got 1"),
        (lambda folder: (folder / "config.json").unlink(), FileNotFoundError, "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), ValueError, "is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), ValueError, "must hold a JSON object"),
        (lambda folder: (folder / "thresholds.safetensors").unlink(), FileNotFoundError, "has no thresholds.safetens"),
        (lambda folder: (folder / "thresholds.safetensors").write_bytes(b"x" * 99), ValueError, "is no safetensors"),
        (lambda folder: change(folder, heads=5), ValueError, r"thresholds as float32 \[3, 5\].*got .* \[3, 4\]"),
        (lambda folder: change(folder, layers=[0, 1]), ValueError, r"thresholds as float32 \[2, 4\]"),
        (lambda folder: change(folder, config={"min_length": 4}), ValueError, "incomplete calibration: 'block_size'"),
        (
            lambda folder: save_file({"thresholds": torch.zeros(3, 4)}, folder / "thresholds.safetensors"),
            ValueError,
            "incomplete calibration: 'errors'",
        ),
        (
            lambda folder: save_file({"thresholds": torch.zeros(3, 4).half()}, folder / "thresholds.safetensors"),
            ValueError,
            "must hold thresholds as float32",
        ),
    ],
)  # fmt: skip
def test_files_that_are_refused(tmp_path, spoil, error, match):
    calibration().save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(error, match=match):
        Calibration.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "./some/where", "/no/such/folder", "a/b/c"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match="is no folder"):
        Calibration.from_pretrained(name)


def test_from_the_hub(tmp_path, monkeypatch):
    calibration().save_pretrained(tmp_path)
    asked = []

    def download(repo_id, revision, allow_patterns):
        asked.append((repo_id, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert_same(calibration(), Calibration.from_pretrained("owner/name", revision="v1"))
    assert asked == [("owner/name", "v1", ["config.json", "thresholds.safetensors"])]


def test_to_the_hub(monkeypatch):
    did = []

    class Api:
        def __init__(self, token):
            did.append(token)

        def create_repo(self, repo_id, private, exist_ok):
            did.append((repo_id, private, exist_ok))

        def upload_folder(self, repo_id, folder_path, revision, commit_message):
            assert_same(calibration(), Calibration.from_pretrained(folder_path))
            did.append((repo_id, revision, commit_message))
            return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert calibration().push_to_hub("owner/name", revision="v1", private=True, token="t") == "https://hub/commit"
    assert did == ["t", ("owner/name", True, True), ("owner/name", "v1", "Upload calibration")]
