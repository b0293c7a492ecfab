# SPDX-License-Identifier: BSD-3-Clause
"""`sale-flex calibrate`: thresholds for every layer and head of a model, from texts.

This module holds the command line alone; what needs transformers is imported when the command runs.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from sale_flex._console.outputs import check_folder
from sale_flex.bench.configs import NAMED, parse_config
from sale_flex.bench.plan import DTYPES, find_device, parse_block_size, parse_list
from sale_flex.calibration.goal import ERRORS, SEARCHES, Goal
from sale_flex.calibration.record import check_free
from sale_flex.config import BLOCK_SIZES

_SIZES = " or ".join(f"{rows},{keys}" for rows, keys in BLOCK_SIZES)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to a parser."""
    add = parser.add_argument
    add("model", help="folder or Hugging Face name of a transformers causal language model with its tokenizer")
    add(
        "--texts",
        type=Path,
        nargs="+",
        required=True,
        metavar="PATH",
        help="files or folders; each is one text, read from its beginning, at each of --lengths",
    )
    add("--lengths", default="8192,32768", help="tokens of a text, comma-separated (default %(default)s)")
    add("--target", type=float, default=0.05, help="largest error of a head's output (default %(default)s)")
    add("--error", choices=ERRORS, default="relative", help="to the output's size, or absolute as published")
    add("--search", choices=SEARCHES, default="bisection", help="bisection, or halving from 0.008 as published")
    add(
        "--config",
        default="default",
        metavar="NAME|FILE",
        help=f"{', '.join(NAMED)}, or a JSON file with the fields of one SaleConfig (default: default)",
    )
    add("--block-size", metavar="ROWS,KEYS", help=f"of a block: {_SIZES} (default: the config's)")
    add(
        "--min-length",
        type=int,
        help="tokens up to which a query keeps everything (default: the config's, or the device's break-even)",
    )
    add("--transfer", type=Path, nargs="+", metavar="PATH", help="texts of another kind to evaluate the result on")
    add("--out", type=Path, required=True, metavar="FOLDER", help="where the result goes")
    add("--resume", action="store_true", help="go on with what an interrupted run left in --out")
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    add("--dtype", choices=DTYPES, help="default: float32 on a CPU, else bfloat16")


def main(args: argparse.Namespace) -> int:
    """Calibrate and write.

    Args:
        args: What a parser with `add_arguments` and ``--json`` returned.

    Returns:
        0, or 2 when it cannot run as asked.

    Raises:
        KeyboardInterrupt: What was finished is in the folder.
        OSError: A file is not there, or can not be read or written.
        ModuleNotFoundError: transformers or safetensors is not installed.
    """
    import safetensors  # noqa: F401 - before the work, not behind it
    import torch

    from sale_flex._console.emit import emit
    from sale_flex.bench.model import find, load
    from sale_flex.calibration.run import calibrate
    from sale_flex.calibration.table import payload

    try:
        # What is cheap to look at comes first, the model's weights last.
        lengths = parse_list("--lengths", args.lengths, int, "numbers of tokens, 2 or more", lambda x: x >= 2)
        Goal(args.target, args.error, args.search)
        config = parse_config(args.config)
        if args.min_length is not None:
            config = replace(config, min_length=args.min_length)
        if args.block_size is not None:
            config = replace(config, block_size=parse_block_size(args.block_size))
        check_folder("--out", args.out)
        check_free(args.out, args.resume)
        device = find_device(args.device)
        dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
        given = {"--texts": args.texts} | ({"--transfer": args.transfer} if args.transfer else {})
        for option, paths in given.items():
            check_texts(option, paths, lengths)
        checkpoint = find(args.model)
        texts = {
            option: read_texts(option, paths, lengths, checkpoint, checkpoint.tokenizer)
            for option, paths in given.items()
        }
        model, _ = load(args.model, getattr(torch, dtype), device)
        calibration = calibrate(
            model,
            texts["--texts"],
            config=config,
            target=args.target,
            error=args.error,
            search=args.search,
            out=args.out,
            resume=args.resume,
            transfer=texts.get("--transfer"),
        )
    except (NotImplementedError, TypeError, ValueError) as error:
        print(f"sale-flex calibrate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sale-flex calibrate: interrupted; the same command with --resume goes on", file=sys.stderr)
        raise
    text = f"{calibration}\nWritten to {args.out}; `sale-flex inspect {args.out}` shows every layer and head."
    emit(payload(calibration), text, args.json)
    return 0


def check_texts(option: str, paths: list[Path], lengths: list[int]) -> None:
    """Find out without a model whether paths are texts, and not far too short.

    Args:
        option: What the paths are from.
        paths: Files, or folders of text files.
        lengths: In tokens.

    Raises:
        OSError: A path is not there or can not be read, or a folder has no text.
        ValueError: A path holds something else, or too little.
    """
    from sale_flex.bench.model import check_bytes, text_files

    for path in paths:
        check_bytes(text_files([path], option), max(lengths), _names(option, path))


def read_texts(option: str, paths: list[Path], lengths: list[int], model: Any, tokenizer: Any) -> list[Any]:
    """A text for every path and length: the token that begins one, if there is one, and the first of the path's.

    Args:
        option: What the paths are from.
        paths: Files, or folders of text files.
        lengths: In tokens.
        model: What has the model's config, for its longest text.
        tokenizer: Its tokenizer.

    Returns:
        int64 ``[1, length]`` each.

    Raises:
        OSError: A path is not there or can not be read, or a folder has no text.
        ValueError: A path holds something else, or too little, or a length is too long for the model.
    """
    from sale_flex.bench.model import read_tokens, text_files

    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and max(lengths) > longest:
        raise ValueError(f"--lengths must be at most {longest} tokens, what the model reads, got {max(lengths)}")
    bos = config.bos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    found = []
    for path in paths:
        tokens = read_tokens(tokenizer, text_files([path], option), max(lengths), bos, _names(option, path))
        found += [tokens[:, :length] for length in lengths]
    return found


def _names(option: str, path: Path) -> tuple[str, str]:
    """What messages call a text and its length."""
    return f"{path}: {option}", "--lengths"
