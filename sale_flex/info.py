# SPDX-License-Identifier: BSD-3-Clause
"""`sale-flex info`: what is installed, what the device is, and which path a call takes here and why.

Everything is found out without running or compiling anything. On CUDA one row of a query is allocated, to ask
`flex_kernel_options` what attention would be given.
"""

import argparse
import importlib.metadata
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sale_flex.config import BLOCK_SIZES
from sale_flex.flex.run import flex_kernel_options

_PACKAGES = ("sale-flex", "torch", "triton", "transformers")


@dataclass(frozen=True)
class Device:
    """Where tensors of a call live by default: the first CUDA device, or the CPU."""

    type: str
    """``"cuda"`` or ``"cpu"``."""
    name: str
    """The GPU's name, or the CPU's architecture and widest vector unit that torch uses."""
    capability: tuple[int, int] | None
    """CUDA compute capability; None on a CPU."""


@dataclass(frozen=True)
class Path:
    """What runs for one half of the work, and why."""

    runs: str
    """Name of the path, or ``"nothing"`` where a call would raise."""
    why: str
    """The facts that decide it, and what to install where something is missing."""


@dataclass(frozen=True)
class Info:
    """The answer of `collect_info`."""

    versions: dict[str, str | None]
    """Package (and ``python``) -> version; None where it is not installed."""
    device: Device
    scan: Path
    """The estimate: quantisation, row limits, scan, index lists."""
    attention: Path
    """Attention on the blocks that are kept."""
    int8_instruction: str | None
    """Matrix instruction of the scan on this GPU; None without a GPU or below compute capability 8.0."""
    kernel_options: dict[str, dict[str, Any]]
    """Block size, for instance ``"64x64"`` -> `flex_kernel_options` of a bfloat16 query with 128 channels."""


def collect_info() -> Info:
    """Find out what runs on this machine and why."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    versions |= {package: _version(package) for package in _PACKAGES}
    versions["torch"] = torch.__version__  # with the build, which the installed metadata may lack
    device = _device()
    query = torch.empty(1, 1, 1, 128, dtype=torch.bfloat16, device=device.type)
    return Info(
        versions,
        device,
        _scan_path(device, versions["triton"]),
        _attention_path(device, versions["triton"]),
        int8_instruction(device.capability),
        {f"{rows}x{keys}": flex_kernel_options(query, (rows, keys)) for rows, keys in BLOCK_SIZES},
    )


def int8_instruction(capability: tuple[int, int] | None) -> str | None:
    """The matrix instruction that int8 products compile to on a CUDA compute capability, None where there is none.

    For compute capability 10 it depends on Triton: 3.9 takes Blackwell's own, 3.7 Ampere's.
    """
    if capability is None or capability < (8, 0):
        return None
    return {9: "wgmma.mma_async", 10: "tcgen05.mma or mma.sync"}.get(capability[0], "mma.sync")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> Device:
    if torch.cuda.is_available():
        return Device("cuda", torch.cuda.get_device_name(), torch.cuda.get_device_capability())
    vectors = torch.backends.cpu.get_cpu_capability()
    return Device("cpu", f"{platform.machine()} {vectors}", None)


def _scan_path(device: Device, triton: str | None) -> Path:
    if device.type == "cpu":
        if torch.version.cuda is None:
            why = f"torch {torch.__version__} is a build without CUDA"
        else:
            why = f"torch is built for CUDA {torch.version.cuda} but finds no device"
        return Path("torch", f"{why}; the vectorised torch implementation runs on every device")
    if triton is None:
        return Path("nothing", "tensors on CUDA need triton, which is not installed: pip install triton")
    if device.capability is not None and device.capability < (8, 0):
        return Path("nothing", f"triton needs compute capability 8.0 or higher, got {device.capability}")
    return Path("triton", f"the device is CUDA and triton {triton} is installed")


def _attention_path(device: Device, triton: str | None) -> Path:
    if device.type == "cuda":
        if triton is None:
            return Path("nothing", "torch.compile needs triton on CUDA: pip install triton")
        return Path("compiled flex_attention, Triton template", "the device is CUDA")
    vectors = torch.backends.cpu.get_cpu_capability()
    if "AVX2" not in vectors and "AVX512" not in vectors:
        return Path(
            "nothing",
            f"compiled flex_attention needs AVX2 on a CPU, and torch finds {vectors}; short prompts "
            "and decoding steps still run scaled_dot_product_attention",
        )
    # The same look-up as torch.compile's.
    compiler = os.environ.get("CXX", "g++")
    found = shutil.which(compiler)
    if found is None:
        return Path(
            "nothing",
            f"torch.compile needs a C++ compiler, and {compiler} is not on PATH; install g++ or set CXX to one",
        )
    return Path("compiled flex_attention, C++ template", f"the CPU has {vectors} and {found} compiles")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`sale-flex info` has no options of its own."""


def main(args: argparse.Namespace) -> int:
    """Print or write the report; always 0."""
    # Here and not above: the report itself is usable without the command line.
    from sale_flex._console.emit import emit

    info = collect_info()
    emit(asdict(info), _render(info), args.json)
    return 0


def _render(info: Info) -> str:
    """The report as aligned lines of text."""
    device = info.device.name
    if info.device.capability is not None:
        device += " (compute capability {}.{})".format(*info.device.capability)
    lines = [(package, version or "not installed") for package, version in info.versions.items()]
    lines += [
        ("device", device),
        ("scan", f"{info.scan.runs}: {info.scan.why}"),
        ("attention", f"{info.attention.runs}: {info.attention.why}"),
        ("int8 instruction", info.int8_instruction or "none (no GPU that has one)"),
    ]
    for size, options in info.kernel_options.items():
        text = " ".join(f"{name}={value}" for name, value in options.items())
        lines.append((f"tiles for {size}", text or "the compiler's own"))
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(f"{name:<{width}}{text}" for name, text in lines)
