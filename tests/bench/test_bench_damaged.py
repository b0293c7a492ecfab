# SPDX-License-Identifier: BSD-3-Clause
"""Files that bench reads back, after somebody edited them: they load, or a ValueError names the file and the field."""

import json
from pathlib import Path

import pytest
import torch
from damage_harness import complaint, damages, named, places, replaced
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sale_flex import SaleConfig
from sale_flex.bench import configs, plot
from sale_flex.bench.captured import NAMES, Captured, read_captured, write_captured
from sale_flex.bench.results import Results, setting_key
from sale_flex.bench.table import render
from sale_flex.cli import main

SETTINGS = settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Of a call so short that it is dense, and nothing compiles."""
    path = tmp_path_factory.mktemp("bench") / "rows.json"
    shape = ["--heads", "2", "--kv-heads", "1", "--head-dim", "32", "--device", "cpu", "--rounds", "1"]
    given = ["--lengths", "64", "--baselines", "sdpa,cudnn", "--densities", "0.5", "--json", str(path)]
    assert main(["bench", *shape, *given]) == 0
    return json.loads(path.read_text())


def show(path: Path, content: object) -> None:
    """All that bench does with rows that are there."""
    path.write_text(json.dumps(content))
    results = Results(path)
    for key in {setting_key(row): row for row in json.loads(path.read_text())}:
        found = results.find(key)
        assert found is not None
        render(found)
        if any(row["ms"] is not None for row in found):
            plot.draw([found])


def test_rows_are_shown_as_they_were_written(rows, tmp_path):
    show(tmp_path / "rows.json", rows)
    assert json.loads((tmp_path / "rows.json").read_text()) == rows


@SETTINGS
@given(data=st.data())
def test_damaged_rows(rows, tmp_path_factory, data):
    path, _, content = data.draw(damages(rows))
    file = tmp_path_factory.mktemp("rows") / "rows.json"
    message = complaint(lambda: show(file, content))
    # That a field the row is told apart by is gone shows as the field, or as a row that is alone.
    alone = message is not None and "name must be 'sale_attention' in one of the rows" in message
    nothing = message is not None and "nothing to draw" in message
    holds = message is not None and str(file) in message and (named(path, message) or "something else" in message)
    assert message is None or alone or nothing or holds, f"{path}: {message}"


READ = [
    "length", "inputs", "batch", "heads", "kv_heads", "head_dim", "dtype", "outliers", "seed", "config",
    "config_fields", "target_density", "baselines", "keep_compiled", "device", "torch", "cuda", "triton", "sale_flex",
    "commit", "command", "name", "not_run", "ms", "ms_all", "extra_bytes", "extra_over_query", "error", "error_usual",
    "error_to_dense", "threshold", "density", "dropped", "path", "over_sdpa", "over_cudnn",
]  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_no_field_of_a_row_can_hold_just_anything(rows, tmp_path, name):
    changed = [row | {name: [["some", "thing"]]} for row in rows]
    with pytest.raises(ValueError, match=rf"^--json .*rows\.json.*\b{name}\b.*name another file"):
        show(tmp_path / "rows.json", changed)


def test_every_field_of_a_row_is_named_above(rows):
    assert {name for row in rows for name in row} == {*READ, "transformers"}


@pytest.mark.parametrize("name", ["ms", "density", "baselines", "over_sdpa", "not_run", "error"])
def test_what_is_missing_is_named_when_it_is_shown(rows, tmp_path, name):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{key: value for key, value in row.items() if key != name} for row in rows]))
    results = Results(path)  # rows of another version need not hold all
    (key,) = {setting_key(row) for row in json.loads(path.read_text())}
    with pytest.raises(ValueError, match=rf"--json .*rows\.json, 64 tokens, default: .*\b{name}\b.*--fresh"):
        results.find(key)


def test_a_setting_without_its_whole_call_is_refused(rows, tmp_path, capsys):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows[:-1]))
    with pytest.raises(ValueError, match="name must be 'sale_attention' in one of the rows"):
        show(path, rows[:-1])


RULE = {"name": "mass", "threshold": 0.1, "bits": 8, "max_blocks": None}
CONFIGS = {"mine": {"rule": RULE, "block_size": [64, 32]}}


@SETTINGS
@given(damaged=damages(CONFIGS))
def test_damaged_configs(tmp_path_factory, damaged):
    path, _, content = damaged
    file = tmp_path_factory.mktemp("configs") / "configs.json"
    file.write_text(json.dumps(content))
    found: list[SaleConfig] = []
    message = complaint(lambda: found.extend(configs.parse_configs(str(file)).values()))
    whole = message is not None and "must map a name to fields of SaleConfig, one object per name" in message
    assert message is None or (f"--configs {file}" in message and (whole or named(path, message))), (path, message)
    assert all(type(config.rule.bits) is int and type(config.rule.threshold) is float for config in found)


@pytest.mark.parametrize("path", [path for path in places(CONFIGS) if path], ids=lambda path: ".".join(map(str, path)))
def test_no_field_of_a_config_can_hold_just_anything(tmp_path, path):
    file = tmp_path / "configs.json"
    file.write_text(json.dumps(replaced(CONFIGS, path, [{"some": "thing"}])))
    with pytest.raises(ValueError, match=r"^--configs .*configs\.json") as caught:
        configs.parse_configs(str(file))
    assert path == ("mine",) or named(path, str(caught.value))


def tensors(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    made = {"query": torch.ones(1, 4, 8, 32), "key": torch.ones(1, 2, 8, 32), "value": torch.ones(1, 2, 8, 32)}
    return {f"layer3.{name}": x for name, x in (made | changes).items() if x is not None}


def test_a_capture_comes_back(tmp_path):
    path = tmp_path / "qkv.safetensors"
    write_captured(path, {3: Captured(*tensors().values(), 0.25)}, "a/model")
    layer, captured = read_captured(path)
    assert (layer, captured.scale) == (3, 0.25)
    assert [list(x.shape) for x in captured[:3]] == [[1, 4, 8, 32], [1, 2, 8, 32], [1, 2, 8, 32]]


@pytest.mark.parametrize("scale", ["", "x", "nan", "inf", "-0.1", "0", "1e400", "0.1,0.2"])
def test_a_scale_that_is_none(tmp_path, scale):
    save_file(tensors(), tmp_path / "qkv.safetensors", {"scale": scale})
    with pytest.raises(ValueError, match=r"--qkv .*qkv\.safetensors: scale must be a number above 0.*capture it again"):
        read_captured(tmp_path / "qkv.safetensors")


SHAPES = ((), (4, 8, 32), (1, 4, 0, 32), (2, 4, 8, 32), (1, 3, 8, 32), (1, 4, 9, 32), (1, 4, 8, 64))
DAMAGED = (None, *map(torch.ones, SHAPES), torch.ones(1, 4, 8, 32).half(), torch.ones(1, 4, 8, 32).int())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tensor", DAMAGED, ids=lambda x: "none" if x is None else f"{list(x.shape)} {x.dtype}")
def test_damaged_captures(tmp_path, name, tensor):
    path = tmp_path / "qkv.safetensors"
    save_file(tensors(**{name: tensor}), path, {"scale": "0.1"})
    message = complaint(lambda: read_captured(path))
    if message is None:
        _, (query, key, value, _) = read_captured(path)
        assert query.shape[1] % key.shape[1] == 0
        assert query.dtype == key.dtype == value.dtype
        assert value.shape[:3] == key.shape[:3] == (query.shape[0], key.shape[1], query.shape[2])
    else:
        assert f"--qkv {path}" in message
        assert name in message or (name == "query" and "no layers" in message)
