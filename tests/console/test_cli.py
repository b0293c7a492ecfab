# SPDX-License-Identifier: BSD-3-Clause
"""The command line: what it prints, writes, imports and returns."""

import json
import subprocess
import sys
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch

import sale_flex
from sale_flex import cli, info
from sale_flex.config import BLOCK_SIZES


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_info_as_text(capsys):
    assert cli.main(["info"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["sale-flex"] == sale_flex.__version__
    assert lines["torch"] == torch.__version__
    assert {"python", "triton", "device", "scan", "attention", "int8", "tiles"} <= set(lines)


def test_info_as_json_alone(capsys):
    assert cli.main(["info", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report) == ["versions", "device", "scan", "attention", "int8_instruction", "kernel_options"]
    assert set(report["versions"]) == {"python", "sale-flex", "torch", "triton", "transformers"}
    assert set(report["kernel_options"]) == {f"{rows}x{keys}" for rows, keys in BLOCK_SIZES}
    for half in ("scan", "attention"):
        assert set(report[half]) == {"runs", "why"}


def test_info_to_a_file_and_as_text(capsys, tmp_path):
    assert cli.main(["info", "--json", str(tmp_path / "info.json")]) == 0
    assert "device" in capsys.readouterr().out
    assert json.loads((tmp_path / "info.json").read_text())["device"]["type"] in ("cpu", "cuda")


def test_file_that_can_not_be_written(capsys, tmp_path):
    path = tmp_path / "missing" / "info.json"
    assert cli.main(["info", "--json", str(path)]) == 2
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_info_tells_the_path_that_runs(device, monkeypatch):
    query = torch.randn(1, 2, 256, 32, device=device)
    path = info._scan_path(info._device() if device == "cuda" else CPU, "3")
    ran = []
    module = import_module({"torch": "sale_flex.ops.fallback.mass", "triton": "sale_flex.kernels.mass"}[path.runs])
    scan = module.mass_hits
    monkeypatch.setattr(module, "mass_hits", lambda *args: (ran.append(path.runs), scan(*args))[1])
    sale_flex.create_sale_block_mask(query, query)
    assert ran == [path.runs]


@pytest.mark.gpu
def test_info_on_a_gpu():
    report = info.collect_info()
    assert report.device.type == "cuda"
    assert report.device.capability == torch.cuda.get_device_capability()
    assert report.scan.runs == "triton"
    assert report.int8_instruction is not None
    assert all(options["BLOCK_M"] for options in report.kernel_options.values())


CPU = info.Device("cpu", "a CPU", None)
HOPPER = info.Device("cuda", "a GPU", (9, 0))


def test_scan_path_names_what_is_missing():
    assert info._scan_path(HOPPER, "3.7.1").runs == "triton"
    assert info._scan_path(HOPPER, None) == info.Path(
        "nothing", "tensors on CUDA need triton, which is not installed: pip install triton"
    )
    old = info._scan_path(info.Device("cuda", "a GPU", (7, 5)), "3.7.1")
    assert old.runs == "nothing"
    assert "(7, 5)" in old.why


def test_attention_path_names_what_is_missing(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setenv("CXX", sys.executable)
    assert info._attention_path(CPU, None).runs == "compiled flex_attention, C++ template"
    monkeypatch.setenv("CXX", "no-such-compiler")
    path = info._attention_path(CPU, None)
    assert path.runs == "nothing"
    assert "no-such-compiler is not on PATH" in path.why
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    path = info._attention_path(CPU, None)
    assert path.runs == "nothing"
    assert "needs AVX2" in path.why
    assert info._attention_path(HOPPER, "3.7.1").runs == "compiled flex_attention, Triton template"
    assert info._attention_path(HOPPER, None).runs == "nothing"


def test_int8_instruction_by_generation():
    assert info.int8_instruction(None) is None
    assert info.int8_instruction((7, 5)) is None
    assert info.int8_instruction((8, 9)) == "mma.sync"
    assert info.int8_instruction((9, 0)) == "wgmma.mma_async"
    assert info.int8_instruction((10, 0)) == "tcgen05.mma or mma.sync"
    assert info.int8_instruction((12, 0)) == "mma.sync"


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"sale-flex {sale_flex.__version__}\n"


@pytest.mark.parametrize("argv", [[], ["no-such-command"], ["info", "--no-such-option"]])
def test_wrong_usage(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(argv)
    assert "usage: sale-flex" in capsys.readouterr().err


@pytest.fixture(scope="module")
def helps() -> dict[str, dict[str, Any]]:
    """What ``--help`` of the whole, then of each command prints and has imported, in one fresh interpreter."""
    done = run(
        "import contextlib, io, json, sys\n"
        "from sale_flex.cli import main\n"
        "found = {}\n"
        "for command in ('', 'bench', 'capture'):\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):\n"
        "        main([*command.split(), '--help'])\n"
        "    found[command] = {'text': out.getvalue(), 'modules': sorted(sys.modules)}\n"
        "print(json.dumps(found))"
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_help_names_the_commands_and_imports_none(helps):
    text, modules = helps[""].values()
    names = ("info", "demo", "bench", "capture")
    assert all(f"\n    {name}  " in text for name in names)
    assert not {f"sale_flex.{name}" for name in names} & set(modules)


@pytest.mark.parametrize("command", ["bench", "capture"])
def test_help_of_a_command_imports_nothing_optional(command, helps):
    text, modules = helps[command].values()
    assert f"usage: sale-flex {command}" in text
    assert not {"transformers", "safetensors", "matplotlib", "rich", "triton"} & set(modules)


@pytest.mark.parametrize("package", ["transformers", "tokenizers"])
def test_missing_extra(package):
    done = run(
        f"import sys; sys.modules[{package!r}] = None\n"
        "from sale_flex.cli import main\n"
        "raise SystemExit(main(['demo', '--no-plot']))"
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr == (f"sale-flex demo needs {package}, which is not installed: pip install 'sale-flex[demo]'\n")


def test_reader_that_leaves_early():
    process = subprocess.Popen(
        [sys.executable, "-m", "sale_flex", "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.wait() == 0
    assert process.stderr.read() == ""
    process.stderr.close()


def test_command_is_installed():
    (command,) = (point for point in entry_points(group="console_scripts") if point.name == "sale-flex")
    assert command.load() is cli.main
