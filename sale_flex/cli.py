# SPDX-License-Identifier: BSD-3-Clause
"""The command line, ``sale-flex`` or ``python -m sale_flex``.

A subcommand is a module with ``add_arguments(parser)`` and ``main(args) -> exit status``; it is imported only if it is
the one asked for. Exit status: 0 done, 1 a check failed, 2 wrong usage, a missing
package or a file that can not be read or written, 130 interrupted.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import sale_flex
from sale_flex._console.outputs import check_writable

_COMMANDS = {
    "info": ("sale_flex.info", "versions, device, and which path runs here and why"),
    "demo": ("sale_flex.demo", "prefill a real prompt densely and with SALE, and compare"),
    "bench": ("sale_flex.bench", "time, memory and error of every stage, beside dense attention"),
    "capture": ("sale_flex.bench.capture", "store queries, keys and values of a model's attention for bench"),
    "eval": ("sale_flex.eval.command", "what rules cost a model on your text, beside dense attention"),
    "calibrate": ("sale_flex.calibration.command", "find thresholds for every layer and head of a model"),
    "inspect": ("sale_flex.calibration.view", "show a calibration's thresholds, densities and errors"),
}
_EXTRAS = {"demo": "demo", "bench": "bench", "capture": "bench", "eval": "eval", "calibrate": "hf", "inspect": "hf"}
"""Subcommand -> the extra that brings the packages it may lack."""
_OPTIONAL = {
    "gguf": None,
    "huggingface_hub": None,
    "matplotlib": "viz",
    "rich": None,
    "safetensors": None,
    "tokenizers": None,
    "transformers": None,
}
"""Those packages -> the extra that brings them to any subcommand, None where it is the subcommand's own."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status.

    Args:
        argv: Arguments without the program's name; by default those of the process.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    command = next((argument for argument in argv if not argument.startswith("-")), None)
    try:
        args = _parser(command).parse_args(argv)
        if args.json not in (None, "-"):
            check_writable("--json", Path(args.json))
        status = int(importlib.import_module(_COMMANDS[args.command][0]).main(args))
        sys.stdout.flush()  # here, where a closed pipe is handled, and not when Python exits
        return status
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _OPTIONAL or command not in _EXTRAS:
            raise
        extra = _OPTIONAL[package] or _EXTRAS[command]
        print(
            f"sale-flex {command} needs {package}, which is not installed: pip install 'sale-flex[{extra}]'",
            file=sys.stderr,
        )
        return 2
    except BrokenPipeError:
        # Whoever reads the output has seen enough. What is still buffered must not fail again when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"sale-flex {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser(command: str | None) -> argparse.ArgumentParser:
    """The parser, with the arguments of `command` alone; the other subcommands are named, not imported."""
    parser = argparse.ArgumentParser(prog="sale-flex", description="SALE sparse attention for PyTorch FlexAttention.")
    parser.add_argument("--version", action="version", version=f"sale-flex {sale_flex.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, (module, summary) in _COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if name == command:
            subparser.add_argument("--json", metavar="PATH|-", help="write the result as JSON; - prints it alone")
            importlib.import_module(module).add_arguments(subparser)
    return parser
