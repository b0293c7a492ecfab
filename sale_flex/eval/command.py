# SPDX-License-Identifier: BSD-3-Clause
"""`sale-flex eval`: what rules cost a model on the user's text, beside dense attention, and a verdict.

This module holds the command line alone; what needs transformers is imported when the command runs.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sale_flex._console.outputs import check_folder
from sale_flex.bench.configs import MIN_LENGTH, NAMED
from sale_flex.bench.plan import DTYPES, find_device, parse_list

if TYPE_CHECKING:
    from sale_flex.eval.verdict import Verdict

DEMO = "demo"
"""Stands for the bundled model, and for texts that it was not trained on."""

RULES = {False: "default,fast,relative", True: "default"}
LENGTHS = {"cuda": "8192,32768", "cpu": "4096"}
SEQUENCES = {False: 8, True: 4}
"""By --quick, and by device."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to a parser."""
    add = parser.add_argument
    add("model", help=f"folder or Hugging Face name of a causal language model; {DEMO}: the bundled one")
    add("--gguf", metavar="FILE", help="file of the model's folder that holds its weights, if that is a GGUF file")
    add("--texts", type=Path, nargs="+", metavar="PATH", help=f"files or folders of text (only {DEMO} has its own)")
    add(
        "--rules",
        metavar="RULES",
        help=f"comma-separated NAME[/OPTION=VALUE...][:THRESHOLD...], names among {', '.join(NAMED)} and registered "
        f"rules (default {RULES[False]}; with --quick one, {RULES[True]})",
    )
    add(
        "--lengths",
        help=f"tokens of a sequence, comma-separated (default {LENGTHS['cuda']}; {LENGTHS['cpu']} on a CPU)",
    )
    add("--sequences", type=int, help=f"how many of a length, at most (default {SEQUENCES[False]}; {SEQUENCES[True]})")
    add("--min-length", type=int, default=MIN_LENGTH, help="tokens up to which queries keep all (default %(default)s)")
    add("--quick", action="store_true", help="judge one rule on a few sequences: pass, or the setting that passes")
    add("--max-rise", type=float, default=0.01, help="in mean loss, in nats, that passes (default %(default)s)")
    add("--out", type=Path, required=True, metavar="FOLDER", help="where the report goes")
    add("--resume", action="store_true", help="go on with what an interrupted run left in --out")
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    add("--dtype", choices=DTYPES, help="default: float32 on a CPU, else bfloat16")


def main(args: argparse.Namespace) -> int:
    """Measure and write the report.

    Args:
        args: What a parser with `add_arguments` and ``--json`` returned.

    Returns:
        0, or 1 when the verdict is a fail, or 2 when it cannot run as asked.

    Raises:
        KeyboardInterrupt: What was measured is in the folder.
        OSError: A file is not there, or can not be read or written.
        ModuleNotFoundError: transformers, matplotlib or, for --gguf, gguf is not installed.
    """
    import matplotlib  # noqa: F401 - before the work, not behind it

    if args.gguf is not None:
        import gguf  # noqa: F401

    from sale_flex._console.emit import emit
    from sale_flex.eval.table import markdown

    try:
        payload, found, verdict = _run(args)
    except (NotImplementedError, TypeError, ValueError) as error:
        print(f"sale-flex eval: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sale-flex eval: interrupted; the same command with --resume goes on", file=sys.stderr)
        raise
    text = markdown(found, payload["provenance"]) if verdict is None else verdict.describe()
    emit(payload, f"{text}\nThe report is {args.out / 'report.html'}.", args.json)
    return 1 if verdict is not None and not verdict.passes else 0


def _run(args: argparse.Namespace) -> tuple[dict[str, Any], Any, "Verdict | None"]:
    import torch

    from sale_flex._console.progress import make_progress
    from sale_flex._console.provenance import provenance
    from sale_flex.bench.model import find, load
    from sale_flex.calibration.weights import fingerprint
    from sale_flex.eval import report, run
    from sale_flex.eval.record import Record
    from sale_flex.eval.rules import parse_rules
    from sale_flex.eval.sequences import longest_of, read_sequences
    from sale_flex.eval.subject import Subject
    from sale_flex.eval.verdict import judge

    # What is cheap to look at comes first, the model's weights last.
    device = find_device(args.device)
    asked = LENGTHS["cpu" if device.type == "cpu" else "cuda"] if args.lengths is None else args.lengths
    lengths = parse_list("--lengths", asked, int, "numbers of tokens, 2 or more", lambda x: x >= 2)
    rules = parse_rules(RULES[args.quick] if args.rules is None else args.rules, args.min_length)
    if args.quick and len(rules) != 1:
        raise ValueError(f"--quick judges one rule, got {', '.join(rules)}; name one by --rules, or leave out --quick")
    if args.quick and len(lengths) != 1 and args.lengths is not None:
        raise ValueError(f"--quick takes one of --lengths, got {args.lengths}")
    count = SEQUENCES[args.quick] if args.sequences is None else args.sequences
    if count < 1:
        raise ValueError(f"--sequences must be 1 or more, got {count}")
    if not args.max_rise >= 0:
        raise ValueError(f"--max-rise must be 0 or more nats, got {args.max_rise}")
    check_folder("--out", args.out)
    name, texts = _find_texts(args)
    checkpoint = find(name, args.gguf)
    longest = longest_of(checkpoint.config)
    if longest is not None and max(lengths) > longest:
        if args.lengths is not None:
            raise ValueError(f"--lengths must be at most {longest} tokens, what the model reads, got {max(lengths)}")
        lengths = sorted({min(length, longest) for length in lengths})
    lengths = lengths[-1:] if args.quick else lengths
    parts = {length: read_sequences(texts, length, count, checkpoint) for length in lengths}
    dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    model, _ = load(name, getattr(torch, dtype), device, args.gguf)
    where = provenance(device)
    common = {"model": args.model, "weights": fingerprint(model), "dtype": dtype} | {
        field: where[field] for field in ("device", "torch", "triton", "transformers", "sale_flex")
    }
    record = Record(args.out, common, args.resume)
    verdict = None
    with Subject.running(model) as subject:
        if args.quick:
            (label, config), tried = next(iter(rules.items())), {}

            def measure(label: str, config: Any) -> run.Outcome:
                tried[label] = config
                with make_progress(run.missing(record, parts, {label: config})) as meter:
                    run.measure(subject, record, parts, {label: config}, meter)
                return run.outcomes(record, parts, {label: config})[0]

            verdict = judge(label, config, args.max_rise, measure)
            rules = tried
        else:
            with make_progress(run.missing(record, parts, rules)) as meter:
                run.measure(subject, record, parts, rules, meter)
    found = run.outcomes(record, parts, rules)
    pictures = report.pictures_of(record, parts, rules, found)
    return report.write(args.out, args.model, found, pictures, parts, where, verdict), found, verdict


def _find_texts(args: argparse.Namespace) -> tuple[str, list[Path]]:
    """The model's name, and its texts."""
    if args.model != DEMO:
        if args.texts is None:
            raise ValueError("--texts must name files or folders of text that stand for your prompts, got none")
        return args.model, args.texts
    from sale_flex.demo.model import PACKAGED
    from sale_flex.demo.prompt import HELD_OUT, standard_library

    return str(PACKAGED), args.texts or [standard_library() / f"{module}.py" for module in HELD_OUT]
