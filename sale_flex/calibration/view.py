# SPDX-License-Identifier: BSD-3-Clause
"""`sale-flex inspect`: a calibration's thresholds, densities and errors by layer and head."""

import argparse
import sys
from pathlib import Path

from sale_flex._console.outputs import check_writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to a parser."""
    parser.add_argument("calibration", help="folder of a calibration, or its owner/name on the Hugging Face hub")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw the tables (needs matplotlib)")


def main(args: argparse.Namespace) -> int:
    """Print, and draw if asked.

    Args:
        args: What a parser with `add_arguments` and ``--json`` returned.

    Returns:
        0, or 2 when it cannot run as asked.

    Raises:
        ModuleNotFoundError: safetensors, or for the plot matplotlib, is not installed.
        OSError: A file is not there or can not be written.
    """
    if args.plot:
        from sale_flex.calibration.plot import draw
    from sale_flex._console.emit import emit
    from sale_flex.calibration.artefact import Calibration
    from sale_flex.calibration.table import payload, render

    try:
        if args.plot:
            check_writable("--plot", args.plot)
        calibration = Calibration.from_pretrained(args.calibration, revision=args.revision)
    except ValueError as error:
        print(f"sale-flex inspect: {error}", file=sys.stderr)
        return 2
    if args.plot:
        draw(calibration).savefig(args.plot)
        print(f"Plot: {args.plot}", file=sys.stderr)
    emit(payload(calibration), render(calibration), args.json)
    return 0
