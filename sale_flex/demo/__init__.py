# SPDX-License-Identifier: BSD-3-Clause
"""`sale-flex demo`: a small language model recalls notes from a long prompt, dense and SALE.

This module holds the command line alone; what needs transformers is imported when the demo runs.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from sale_flex._console.outputs import check_writable

DEFAULT_PICTURE = Path("sale-flex-demo.png")
DEFAULT_TOKENS = 8192
DEFAULT_THRESHOLD = 0.01


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options to a parser."""
    parser.add_argument(
        "--threshold",
        type=float,
        default=DEFAULT_THRESHOLD,
        help="share of a row's probability that a block must hold, 0 keeps every block (default %(default)s)",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=DEFAULT_TOKENS,
        help="length of the prompt (default %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="chooses text, keys, values and places (default 0)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="default: float32 on a CPU, else bfloat16",
    )
    parser.add_argument("--model", type=Path, help="folder of another model trained on the same kind of lines")
    picture = parser.add_mutually_exclusive_group()
    picture.add_argument(
        "--plot",
        type=Path,
        metavar="PATH",
        help=f"picture of the kept blocks (default {DEFAULT_PICTURE} if matplotlib is installed)",
    )
    picture.add_argument("--no-plot", action="store_true", help="draw no picture")


def main(args: argparse.Namespace) -> int:
    """Run the demo.

    Args:
        args: What a parser with `add_arguments` and ``--json`` returned.

    Returns:
        0 when recall and density are as they should be, 1 when one is not, 2 when the demo cannot
        run as asked.

    Raises:
        ModuleNotFoundError: A package that the demo needs is not installed.
    """
    picture = None
    if args.plot or (find_spec("matplotlib") and not args.no_plot):
        from sale_flex.demo.picture import draw

        picture = args.plot or DEFAULT_PICTURE
        check_writable("--plot", picture)
    from sale_flex._console.emit import emit
    from sale_flex.demo.run import run
    from sale_flex.demo.table import render

    try:
        report, maps = run(
            folder=args.model,
            threshold=args.threshold,
            tokens=args.tokens,
            seed=args.seed,
            device=args.device,
            dtype=args.dtype,
            want_maps=picture is not None,
        )
        text = render(report)
        if picture is not None:
            draw(maps, report).savefig(picture)
            text += f"\nPicture of the kept blocks: {picture}"
        emit(report.to_dict(), text, args.json)
    except (OSError, ValueError) as error:
        print(f"sale-flex demo: {error}", file=sys.stderr)
        return 2
    for problem in report.problems():
        print(f"sale-flex demo: {problem}", file=sys.stderr)
    return 1 if report.problems() else 0
