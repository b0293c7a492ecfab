# SPDX-License-Identifier: BSD-3-Clause
"""`sale-flex bench`: time, memory and error of every stage, beside dense attention.

This module holds the command line alone; what measures is imported when the benchmark runs.
"""

import argparse
import json
import sys
from pathlib import Path

from sale_flex._console.outputs import check_writable
from sale_flex.bench.baselines import BASELINES
from sale_flex.bench.configs import NAMED
from sale_flex.bench.plan import DTYPES, LENGTHS, SHAPE, make_plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options to a parser."""
    add = parser.add_argument
    add("--lengths", help=f"tokens, comma-separated (default {LENGTHS['cuda']}; {LENGTHS['cpu']} on a CPU)")
    for name, default in SHAPE.items():
        meaning = "outlier channels a KV head" if name == "outliers" else ""
        add(f"--{name.replace('_', '-')}", type=int, help=f"{meaning} (default {default})".strip())
    add("--dtype", choices=DTYPES, help="default: bfloat16 on CUDA, float32 on a CPU, or what --qkv has")
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    add("--qkv", type=Path, metavar="FILE", help="a model's tensors from `sale-flex capture` instead of synthetic ones")
    add("--layer", type=int, help="layer of --qkv (default: its first)")
    add(
        "--configs",
        default="default",
        metavar="NAMES|FILE",
        help=f"names among {', '.join(NAMED)}, comma-separated, or a JSON file of names and fields of SaleConfig "
        "(default default)",
    )
    add("--block-size", metavar="ROWS,KEYS", help="of every config (default: its own)")
    add("--densities", help="shares of the blocks to keep, comma-separated (default: by the config's threshold)")
    add(
        "--baselines",
        default="cudnn,flash,flex",
        metavar="NAMES",
        help=f"dense attention, comma-separated: {', '.join(f'{name} ({what})' for name, what in BASELINES.items())} "
        "(default cudnn,flash,flex)",
    )
    add("--rounds", type=int, default=10, help="how often everything is timed, fewer times where it takes long")
    add("--keep-compiled", action="store_true", help="go on with the programs of earlier lengths: dynamic shapes")
    add("--fresh", action="store_true", help="measure again what the file of --json has; without, only what it lacks")
    add("--plot", type=Path, metavar="PATH", help="draw the times (needs matplotlib)")


def main(args: argparse.Namespace) -> int:
    """Run the benchmark.

    Args:
        args: What a parser with `add_arguments` and ``--json`` returned.

    Returns:
        0 when everything asked for is there, 1 when an output is wrong, 2 when it cannot run as asked.

    Raises:
        ModuleNotFoundError: A package that an option needs is not installed.
        KeyboardInterrupt: What was finished is in the file.
        OSError: A file can not be read or written.
    """
    if args.plot:
        from sale_flex.bench.plot import draw
    from sale_flex._console.progress import make_progress
    from sale_flex.bench.check import WrongOutput
    from sale_flex.bench.results import Results
    from sale_flex.bench.run import run

    alone = args.json == "-"
    path = None if alone or args.json is None else Path(args.json)
    try:
        if args.plot:
            check_writable("--plot", args.plot)
        plan = make_plan(args)
        results = Results(path)
        with make_progress(plan.size) as progress:
            settings = run(plan, results, args.fresh, progress, silent=alone)
        if args.plot:
            draw(settings).savefig(args.plot)
            print(f"Plot: {args.plot}", file=sys.stderr)
    except ValueError as error:
        print(f"sale-flex bench: {error}", file=sys.stderr)
        return 2
    except WrongOutput as error:
        print(f"sale-flex bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if path is not None:
            print(f"sale-flex bench: interrupted; the same command goes on after what is in {path}", file=sys.stderr)
        raise
    if alone:
        print(json.dumps([row for rows in settings for row in rows], indent=1))
    return 0
