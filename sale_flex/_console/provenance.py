# SPDX-License-Identifier: BSD-3-Clause
"""What a measured number needs beside it to be repeated: machine, versions, command and commit."""

import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import sale_flex


def provenance(device: torch.device) -> dict[str, str | None]:
    """Fields for every JSON row; None for a package that is absent and for code outside a git checkout."""
    accelerator = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if accelerator else f"cpu x{torch.get_num_threads()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "sale_flex": sale_flex.__version__,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout this file belongs to, with ``+`` when tracked files differ from it."""
    folder = str(Path(__file__).parent)

    def git(*args: str) -> str:
        command = ["git", "-C", folder, *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed copy may lie inside a checkout of something else, which does not track it.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
