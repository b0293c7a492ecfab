# SPDX-License-Identifier: BSD-3-Clause
"""`sale-flex capture`: queries, keys and values of a model's own attention, for `sale-flex bench --qkv`.

This module holds the command line alone; what needs transformers is imported when the command runs.
"""

import argparse
import sys
from pathlib import Path

from sale_flex._console.outputs import check_writable
from sale_flex.bench.plan import DTYPES, find_device, parse_list


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to a parser."""
    add = parser.add_argument
    add("model", help="folder or Hugging Face name of a transformers causal language model with its tokenizer")
    add("--text", type=Path, nargs="+", required=True, metavar="PATH", help="files or folders of text to read")
    add("--layers", required=True, help="layers to capture, comma-separated, the first is 0")
    add("--length", type=int, required=True, help="tokens to read, from the beginning of the text")
    add("--out", type=Path, required=True, metavar="FILE", help="safetensors file to write")
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    add("--dtype", choices=DTYPES, help="default: float32 on a CPU, else bfloat16")


def main(args: argparse.Namespace) -> int:
    """Capture and write.

    Args:
        args: What a parser with `add_arguments` and ``--json`` returned.

    Returns:
        0, or 2 when it cannot run as asked.

    Raises:
        ModuleNotFoundError: transformers or safetensors is not installed.
    """
    import torch

    from sale_flex._console.emit import emit
    from sale_flex.bench.captured import write_captured
    from sale_flex.bench.model import capture, check_bytes, check_layers, find, load, read_tokens, text_files

    try:
        # What is cheap to look at comes first, the model's weights last.
        layers = parse_list("--layers", args.layers, int, "layers, 0 or more", lambda layer: layer >= 0)
        if args.length < 1:
            raise ValueError(f"--length must be 1 or more tokens, got {args.length}")
        check_writable("--out", args.out)
        device = find_device(args.device)
        dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
        files = text_files(args.text)
        check_bytes(files, args.length)
        checkpoint = find(args.model)
        check_layers(checkpoint.config, layers)
        tokens = read_tokens(checkpoint.tokenizer, files, args.length, checkpoint.bos)
        model, _ = load(args.model, getattr(torch, dtype), device)
        captured = capture(model, tokens.to(device), layers)
        metadata = write_captured(args.out, captured, args.model)
    except (NotImplementedError, ValueError) as error:
        print(f"sale-flex capture: {error}", file=sys.stderr)
        return 2
    shapes = {name: list(getattr(captured[layers[0]], name).shape) for name in ("query", "key", "value")}
    text = f"{args.out}: layers {', '.join(map(str, captured))} of {args.model}, {args.length} tokens, {dtype}, query "
    text += f"{shapes['query']}, key and value {shapes['key']}, softmax scale {metadata['scale']}"
    emit({"file": str(args.out), "layers": list(captured), **metadata, "shapes": shapes}, text, args.json)
    return 0
