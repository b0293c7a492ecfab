# SPDX-License-Identifier: BSD-3-Clause
"""`sale-flex bench`: its rows, its file, its checks and its messages. Attention is eager where nothing is compiled."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_harness import attend_listed, attention_by
from torch.nn.attention.flex_attention import BlockMask

import sale_flex.attention
from sale_flex._console.progress import Bar
from sale_flex.bench import configs, measure, results, run, stages, timing
from sale_flex.bench.baselines import causal_block_mask
from sale_flex.bench.check import errors, kept_keys, sampled_rows
from sale_flex.bench.inputs import Inputs, Synthetic
from sale_flex.bench.plan import find_device
from sale_flex.bench.threshold import count_kept
from sale_flex.cli import main
from sale_flex.config import SaleConfig
from sale_flex.testing import block_map, decode_list, dense_attention, expand_blocks

CPU = torch.device("cpu")
SMALL = {"min_length": 64, "local_tokens": 32, "smooth_tokens": 64, "sink_tokens": 16}
"""Fields of a config whose sparse path runs at a few hundred tokens."""
SHAPE = ["--heads", "2", "--kv-heads", "1", "--head-dim", "32", "--device", "cpu"]
NAMES = ["codes", "estimate", "compact", "block mask", "flex", "early rows", "sale_attention"]


def attend_eagerly(*given):
    """The output of what `run_flex` computes."""
    return attend_listed(*given)[0]


@pytest.fixture
def eager() -> Iterator[Callable[[Callable[..., torch.Tensor]], None]]:
    """Attention without a compiler; called with a function of what `run_flex` takes, by that one."""
    with ExitStack() as stack:

        def patch(attend: Callable[..., torch.Tensor]) -> None:
            stack.enter_context(attention_by(lambda *given: (attend(*given), None)))

        patch(attend_eagerly)
        yield patch


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "configs.json"
    table = {
        "mine": SMALL | {"rule": {"threshold": 0.1}},
        "paper": SMALL | {"rule": {"name": "relative", "bits": 8, "threshold": 5.0}},
    }
    path.write_text(json.dumps(table))
    return path


def bench(*arguments: str | Path) -> int:
    return main(["bench", *SHAPE, "--rounds", "2", *map(str, arguments)])


def make_inputs(length: int = 300, heads: int = 4, kv_heads: int = 2) -> Inputs:
    return Synthetic(heads, kv_heads, 32, 1, 0, 0, torch.float32).load(length, CPU)


def small(name: str) -> SaleConfig:
    """A named config that drops blocks of a thousand tokens."""
    return configs.NAMED[name].with_options(threshold=1.0 if name == "relative" else 0.03, **SMALL)


def test_rows_tell_everything(eager, config_file, tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert bench("--configs", config_file, "--lengths", "448,512", "--baselines", "cudnn,sdpa", "--json", path) == 0
    rows = json.loads(path.read_text())
    out, err = capsys.readouterr()
    assert [row["name"] for row in rows] == ["dense cudnn", "dense sdpa", *NAMES] * 4
    assert [(row["length"], row["config"]) for row in rows[::9]] == [
        (length, name) for length in (448, 512) for name in ("mine", "paper")
    ]
    assert next(line for line in err.splitlines() if " of 4: " in line) == "1 of 4: 448 tokens, mine"
    assert out.count("| dense cudnn | not run: needs a CUDA device | - | - | - | - |") == 4
    assert out.count("Speed of sale_attention: ") == 4
    for row in rows:
        assert row["heads"] == 2
        assert row["dtype"] == "float32"
        assert row["config_fields"]["min_length"] == 64
        assert row["torch"] == torch.__version__
        assert {"triton", "cuda", "device", "commit", "command", "sale_flex"} <= row.keys()
        assert 0 < row["density"] < 1
        assert row["dropped"] == 0
        assert row["over_cudnn"] is None
        if row["name"] == "dense cudnn":
            assert row["not_run"] == "needs a CUDA device"
        if row["not_run"] is not None:
            assert row["name"] == "dense cudnn"
            assert row["ms"] is None
            continue
        assert row["ms"] == sum(row["ms_all"]) / 2
        assert row["over_sdpa"] > 0
        assert row["extra_bytes"] is None  # nobody counts on a CPU
        if row["name"] in ("dense sdpa", "flex", "sale_attention"):
            assert row["error"] < 1e-5
    whole = rows[8]
    assert whole["over_sdpa"] == pytest.approx(whole["ms"] / rows[1]["ms"])
    assert 1e-4 < whole["error_to_dense"] < 1


def test_a_short_call_is_dense_and_says_so(eager, tmp_path):
    path = tmp_path / "rows.json"
    assert bench("--configs", "fast,relative", "--lengths", "256", "--baselines", "sdpa", "--json", path) == 0
    rows = json.loads(path.read_text())
    assert {row["not_run"] for row in rows if row["name"] in NAMES[:-1]} == {
        "the call ran dense scaled_dot_product_attention: no more keys than min_length"
    }
    assert all(row["ms"] > 0 and row["density"] == 1 for row in rows if row["name"] == "sale_attention")


def test_the_threshold_is_searched_for_a_density(eager, config_file, tmp_path):
    path = tmp_path / "rows.json"
    lengths = ["--lengths", "1024", "--baselines", "sdpa", "--json", path]
    assert bench("--configs", config_file, "--densities", "0.5,0.65", *lengths) == 0
    rows = json.loads(path.read_text())
    assert [row["target_density"] for row in rows[::8]] == [0.5, 0.65] * 2
    for row in rows:
        assert row["density"] == pytest.approx(row["target_density"], abs=0.03)
        assert row["threshold"] != row["config_fields"]["rule"]["threshold"]


def test_json_alone(eager, config_file, capsys):
    assert bench("--configs", config_file, "--lengths", "256", "--baselines", "sdpa", "--json", "-") == 0
    assert len(json.loads(capsys.readouterr().out)) == 16


def test_block_size_is_that_of_every_config(eager, config_file, capsys):
    arguments = ["--configs", config_file, "--lengths", "256", "--baselines", "sdpa", "--json", "-"]
    assert bench(*arguments, "--block-size", "128,128") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {tuple(row["config_fields"]["block_size"]) for row in rows} == {(128, 128)}


@pytest.fixture
def measured(monkeypatch) -> list[tuple[int, SaleConfig]]:
    """What `measure` is called for; it still measures."""
    calls = []

    def count(inputs: Inputs, config: SaleConfig, *rest: Any) -> list[results.Row]:
        calls.append((inputs.query.shape[2], config))
        return measure.measure(inputs, config, *rest)

    monkeypatch.setattr(run, "measure", count)
    return calls


def test_a_run_goes_on_with_its_file(eager, config_file, measured, tmp_path, capsys):
    path = tmp_path / "rows.json"
    arguments = ["--configs", config_file, "--baselines", "sdpa", "--json", path, "--lengths"]
    assert bench(*arguments, "256") == 0
    first = json.loads(path.read_text())
    assert len(measured) == 2
    capsys.readouterr()
    assert bench(*arguments, "256") == 0
    assert len(measured) == 2
    assert json.loads(path.read_text()) == first
    assert capsys.readouterr().out.count("| sale_attention |") == 2  # what is there is shown
    assert bench(*arguments, "256,448") == 0
    assert [length for length, _ in measured] == [256, 256, 448, 448]
    assert json.loads(path.read_text())[: len(first)] == first
    assert bench(*arguments, "256", "--seed", "1") == 0
    assert bench(*arguments, "256", "--dtype", "bfloat16") == 0
    assert len(measured) == 8  # other settings
    everything = json.loads(path.read_text())
    assert bench(*arguments, "256", "--fresh") == 0
    assert len(measured) == 10
    again = json.loads(path.read_text())
    assert [results.setting_key(row) for row in again] == [results.setting_key(row) for row in everything]
    assert again[: len(first)] != first


def test_an_interrupted_run_leaves_what_it_finished(eager, config_file, measured, monkeypatch, tmp_path, capsys):
    path = tmp_path / "rows.json"
    arguments = ["--configs", config_file, "--baselines", "sdpa", "--json", path, "--lengths", "256"]
    counting = run.measure

    def interrupt_second(*args: Any) -> list[results.Row]:
        if measured:
            raise KeyboardInterrupt
        return counting(*args)

    monkeypatch.setattr(run, "measure", interrupt_second)
    assert bench(*arguments) == 130
    assert f"goes on after what is in {path}" in capsys.readouterr().err
    assert {row["config"] for row in json.loads(path.read_text())} == {"mine"}
    monkeypatch.setattr(run, "measure", counting)
    assert bench(*arguments) == 0
    assert len(measured) == 2
    assert {row["config"] for row in json.loads(path.read_text())} == {"mine", "paper"}


def test_an_interrupted_write_leaves_the_old_file(monkeypatch, tmp_path):
    path = tmp_path / "rows.json"
    rows = [{"config_fields": {}, "length": 1}]
    results.Results(path).put(rows)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(results.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        results.Results(path)
    assert json.loads(path.read_text()) == rows
    assert [file.name for file in tmp_path.iterdir()] == ["rows.json"]


def attend_to_everything(query, key, value, mask, scale, *_):
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=True
    )


def attend_to_one_block_less(query, key, value, mask, scale, *given):
    """Forgets a block of the last row of blocks."""
    fewer = mask.full_kv_num_blocks.clone()
    fewer[:, :, -1] -= 1
    lists = (mask.kv_num_blocks, mask.kv_indices, fewer, mask.full_kv_indices)
    less = BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=mask.BLOCK_SIZE, mask_mod=mask.mask_mod, seq_lengths=mask.seq_lengths
    )
    return attend_eagerly(query, key, value, less, scale, *given)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "wrong",
    [
        attend_to_everything,
        attend_to_one_block_less,
        lambda *args: 1.01 * attend_eagerly(*args),
        lambda *args: attend_eagerly(*args).log(),
    ],
    ids=["everything", "one block less", "1 % more", "nan"],
)
def test_nothing_is_timed_when_an_output_is_wrong(eager, monkeypatch, config_file, tmp_path, capsys, wrong, dtype):
    monkeypatch.setattr(measure, "interleave", lambda *args: pytest.fail("something was timed"))
    eager(wrong)
    path = tmp_path / "rows.json"
    arguments = ["--configs", config_file, "--lengths", "1024", "--baselines", "sdpa", "--dtype", dtype, "--json", path]
    assert bench(*arguments) == 1
    err = capsys.readouterr().err
    assert "sale-flex bench: the output of flex is wrong, nothing was timed: on 16 sampled rows of every head" in err
    assert json.loads(path.read_text()) == []


def test_out_of_memory_is_a_row_and_not_the_end(eager, config_file, monkeypatch, tmp_path, capsys):
    def fail_paper(inputs: Inputs, config: SaleConfig, *rest: Any) -> list[results.Row]:
        if config.rule.name == "relative":
            raise torch.OutOfMemoryError("tried to allocate\nmore")
        return measure.measure(inputs, config, *rest)

    monkeypatch.setattr(run, "measure", fail_paper)
    path = tmp_path / "rows.json"
    assert bench("--configs", config_file, "--lengths", "256", "--baselines", "sdpa", "--json", path) == 0
    rows = json.loads(path.read_text())
    assert {row["not_run"] for row in rows if row["config"] == "paper"} == {"tried to allocate"}
    assert {row["not_run"] for row in rows if row["config"] == "mine"} == {None}
    assert "256 tokens, paper: keeps - at threshold -" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--lengths", "256,x"], "--lengths must be numbers of tokens"),
        (["--lengths", "0"], "--lengths must be numbers of tokens, 64 or more"),
        (["--densities", "0.1,1.5"], "--densities must be shares above 0, up to 1"),
        (["--densities", "0.1,0.1"], "each once, got '0.1,0.1'"),
        (["--baselines", "cudnn,fa9"], "--baselines must be among cudnn, flash, flex, sdpa"),
        (["--configs", "fast,best"], "names among default, fast, relative"),
        (["--block-size", "64,65"], "--block-size must be rows,keys, one of 64,64; 64,32;"),
        (["--rounds", "0"], "--rounds must be 1 or more"),
        (["--device", "tpu"], "--device must be cpu"),
        (["--layer", "1"], "--layer chooses a layer of --qkv"),
        (["--kv-heads", "0"], "heads, kv_heads and batch must be 1 or more"),
        (["--heads", "3", "--kv-heads", "2"], "heads a multiple of kv_heads"),
        (["--outliers", "99"], "outliers must be in [0, 4]"),
        (["--plot", "no/such/folder.png"], "is in no folder there is"),
        (["--json", "no/such/folder.json"], "folder.json"),
    ],
)
def test_bad_arguments(arguments, reason, capsys):
    assert bench("--lengths", "256", "--baselines", "sdpa", *arguments) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not JSON"),
        ("[]", "must map a name to fields of SaleConfig"),
        ("{}", "must map a name to fields of SaleConfig"),
        ('{"a": {"min_lenght": 1}}', "'a': SaleConfig has no field 'min_lenght'; it has rule, block_size"),
        ('{"a": {"rule": {"treshold": 1}}}', "'a': rule: rule 'mass' has no field 'treshold'; it has threshold, pool"),
        ('{"a": {}, "b": {"rule": {"bits": 5}}}', "'b': rule.bits must be one of (4, 8), got 5"),
        ('{"a": {"rule": {"threshold": [0.1, 0.2]}}}', "'a': rule.threshold must be a float"),
        ('{"a": {"rule": {"name": "mas"}}}', "got 'mas'; a rule of another package"),
        ('{"a": {"rule": "mass"}}', "'a': rule must be a JSON object, got 'mass'"),
    ],
)
def test_bad_config_files(tmp_path, text, reason):
    path = tmp_path / "configs.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"^--configs .*configs\.json") as caught:
        configs.parse_configs(str(path))
    assert reason in str(caught.value)


def test_config_files_and_names():
    assert list(configs.parse_configs("fast, relative")) == ["fast", "relative"]
    with pytest.raises(FileNotFoundError):
        configs.parse_configs("missing.json")


def test_a_file_of_something_else_is_left_alone(tmp_path, capsys):
    path = tmp_path / "rows.json"
    for text in ('{"mine": 1}', "not JSON", '[{"a": 1}]'):
        path.write_text(text)
        assert bench("--lengths", "256", "--json", path) == 2
        assert "is there and" in capsys.readouterr().err
        assert path.read_text() == text


@pytest.mark.parametrize("name", configs.NAMED)
def test_stages_do_what_the_whole_does(name, eager):
    inputs, config = make_inputs(1024), small(name)
    parts = stages.Stages(inputs, config)
    runs = parts.runs()
    assert list(runs) == NAMES
    runs["block mask"]()
    mask = parts.mask
    assert 0.1 < count_kept(inputs, config).density < 0.95
    kept = block_map(mask).kept
    listed = stages.Stages(inputs, config).runs()["compact"]().lists
    flags = torch.zeros_like(kept)
    flags |= decode_list(listed.partial_num, listed.partial_idx, kept.shape[-1])
    flags |= decode_list(listed.full_num, listed.full_idx, kept.shape[-1])
    assert torch.equal(flags, kept)
    output = runs["flex"]()
    assert parts.mask is None
    output[:, :, : parts.early] = runs["early rows"]()
    assert torch.equal(output, runs["sale_attention"]())


def test_kept_keys_are_those_of_the_mask():
    inputs, config = make_inputs(), small("relative")
    mask = sale_flex.create_sale_block_mask(inputs.query, inputs.key, config)
    rows = sampled_rows(300, CPU)
    whole = expand_blocks(block_map(mask).kept, mask.BLOCK_SIZE, 300, 300)
    assert rows[0] == 0
    assert rows[-1] == 299
    assert len(rows) == 16
    for width in (5, 4):  # nk is 5; no list of this mask is longer than 4
        lists = [
            x if x.dim() == 3 else x[..., :width]
            for x in (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
        ]
        narrow = BlockMask.from_kv_blocks(
            *lists,
            BLOCK_SIZE=mask.BLOCK_SIZE,
            mask_mod=mask.mask_mod,
            seq_lengths=(300, 300),
            compute_q_blocks=False,
        )
        for heads in (slice(0, 2), slice(2, 4)):
            assert torch.equal(kept_keys(narrow, 0, heads, rows, 300), whole[0, heads][:, rows])


def test_errors_of_a_long_call_take_no_square():
    length = 65_536  # a float32 S x S of one head would be 17 GB
    inputs = Synthetic(2, 1, 32, 1, 0, 0, torch.float32).load(length, CPU)
    rows = sampled_rows(length, CPU)
    mask = causal_block_mask(length, CPU)
    lists = (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
    mask = BlockMask.from_kv_blocks(
        *(x.expand(1, 2, *x.shape[2:]) for x in lists), BLOCK_SIZE=128, seq_lengths=(length, length),
        compute_q_blocks=False,
    )  # fmt: skip
    seen = torch.arange(length) <= rows[:, None]
    output = dense_attention(inputs.query[:, :, rows], inputs.key, inputs.value, seen).float()
    found = errors(output, inputs, rows, mask)
    assert found == errors(output, inputs, rows, None)
    # What is compared with is a float32 sum of `length` terms, off by about sqrt(length) roundings where errors are of
    # both signs (Higham, section 2.8); the exponentials pass on a rounding of each logit.
    assert found.kept < (length**0.5 + 2 * found.logit) * torch.finfo(torch.float32).eps / 2
    found.check("it")


def test_rounds_are_fewer_where_they_take_long(monkeypatch):
    for seconds, rounds, expected in ((0.1, 10, 10), (4.0, 10, 7), (40.0, 10, 3), (40.0, 2, 2)):
        monkeypatch.setattr(timing, "milliseconds", lambda run, device, ms=seconds * 1e3: ms)
        times = timing.interleave({"a": int, "b": int}, rounds, CPU)
        assert [len(series) for series in times.values()] == [expected] * 2


def test_calls_take_turns():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    timing.interleave(runs, 2, CPU)
    assert order == [*"abcabc"]


def test_plot(eager, config_file, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "times.png"
    arguments = ["--configs", config_file, "--lengths", "448,512", "--baselines", "cudnn,sdpa", "--plot", path]
    assert bench(*arguments) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert f"Plot: {path}" in capsys.readouterr().err


def test_plot_has_a_column_per_config_and_density(eager, config_file, capsys):
    pytest.importorskip("matplotlib")
    from sale_flex.bench.plot import draw

    arguments = ["--configs", config_file, "--lengths", "448,512", "--baselines", "cudnn", "--densities", "0.6,0.7"]
    assert bench(*arguments, "--json", "-") == 0
    rows = json.loads(capsys.readouterr().out)
    settings = [rows[at : at + 8] for at in range(0, len(rows), 8)]
    axes = draw(settings).axes
    titles = ["mine, density 0.6", "mine, density 0.7", "paper, density 0.6", "paper, density 0.7"]
    assert [axis.get_title() for axis in axes[:4]] == titles
    assert axes[4].get_ylabel() == "time, as a share of sale_attention"  # no dense candidate ran
    assert [text.get_text().partition("\n")[0] for text in axes[4].get_xticklabels()] == ["448", "512"]


def test_plot_without_matplotlib_names_its_extra(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "sale_flex.bench.plot", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench("--lengths", "256", "--plot", "times.png") == 2
    assert "pip install 'sale-flex[viz]'" in capsys.readouterr().err


def test_bar_lets_the_table_through(capsys):
    pytest.importorskip("rich")
    with Bar(2) as bar:
        bar.begin("one")
        bar.step("round 1")
        bar.finish("| table |")
    assert capsys.readouterr().out == "| table |\n"


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # what torch's compiler says
def test_compiled(config_file, tmp_path):
    path = tmp_path / "rows.json"
    arguments = ["--configs", config_file, "--lengths", "512", "--baselines", "flex,sdpa", "--json", path]
    assert bench(*arguments) == 0
    rows = json.loads(path.read_text())
    assert not [row["name"] for row in rows if row["not_run"]]
    assert {row["path"] for row in rows} == {"flex_attention after 64 dense rows"}


def test_devices(monkeypatch):
    current = []
    assert find_device("cpu") == find_device(None) == CPU or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert find_device(None) == find_device("cuda") == torch.device("cuda", 0)
    assert find_device("cuda:1") == current[-1] == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="--device must be cpu or cuda:0 or cuda:1, got 'cuda:2'"):
        find_device("cuda:2")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # what SDPA says about its backends, and torch's compiler
def test_on_a_gpu(tmp_path):
    path = tmp_path / "rows.json"
    arguments = [
        "--lengths",
        "4096",
        "--heads",
        "8",
        "--kv-heads",
        "2",
        "--configs",
        "fast,relative",
        "--json",
        path,
    ]
    assert main(["bench", "--device", "cuda", "--rounds", "3", *map(str, arguments)]) == 0
    rows = json.loads(path.read_text())
    assert {row["not_run"] for row in rows} == {None}
    for row in rows:
        assert row["ms"] > 0
        assert row["over_cudnn"] > 0
        assert row["extra_bytes"] >= 0
        if row["name"] in (*NAMES[:4], "sale_attention"):
            assert row["extra_over_query"] > 0
