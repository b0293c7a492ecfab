# SPDX-License-Identifier: BSD-3-Clause
"""Loss and recall of a language model with dense attention, and with SALE in every layer.

Real text the model has not seen carries lines ``# note KEY = VALUE`` in its first half and, later, lines
``# recall KEY = VALUE``; key and value are six random hex digits, so a value can be known only by looking its note up.
The recall lines stand at the end, or are scattered through the second half. The whole sequence goes through the model
once per rule and threshold (teacher forcing). Loss is the mean over all tokens in nats; a recall is exact when every
token of its value is the model's first choice.

    python examples/measure_quality.py MODEL --text FOLDER --sequences 2 --json quality.json

Rules are written ``NAME[/OPTION=VALUE...]:THRESHOLD[:THRESHOLD...]``: a NAME is moments, scan (the mass rule's
estimates), relative (SALE as published), calibrated or calibrated-absolute; an OPTION is a field of `Mass` or of
`SaleConfig`. The threshold of ``calibrated:0.1`` is an error allowed: every head's own threshold is halved until its
output, on other text, errs by less than that share of the output's size (``calibrated-absolute``: by less than that).
As in the paper it begins at 0.008, so that no head keeps less than at that; ``calibrated/start=0.128:0.1`` begins at
that.

Below the table stands the density that each rule needs for the same rise in loss, and whether the mass rule reaches a
rise of at most 0.006, with recall within 0.05 of dense, at half of the density that the relative rule needs for that.

`--needles` counts the rows of which one far key alone takes 0.6 of the softmax, and the share of them whose key's block
is kept. `--check-mask` compares the mask, layer by layer, with the plain-torch reference, and fails if they disagree
anywhere but in a tie with the threshold.

With `--json`, the file is written after every measurement, and what it already holds is not measured again, unless the
commit, the device or torch is another (or with `--fresh`: changes that are not committed do not show).
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import quality_model as run
import torch
from quality_model import Attention, Sample
from quality_rules import (
    CHECK_COLUMNS,
    NEEDLE_COLUMNS,
    NEEDLE_RULES,
    QUALITY_COLUMNS,
    RECALL_LIMIT,
    RISE_LIMIT,
    RULES,
    SHARE_LIMIT,
    Rows,
    Rule,
    collect_points,
    equal_loss,
    half_density,
    parse_rules,
    placement_table,
    table,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from sale_flex import SaleConfig
from sale_flex._console.provenance import provenance
from sale_flex.bench.captured import Captured
from sale_flex.bench.configs import MIN_LENGTH
from sale_flex.bench.model import capture, text_files

CHECK_LENGTH = 8192  # the reference holds whole score matrices of a head
THRESHOLDS = dict.fromkeys(("scan", "moments"), "0.01,0.02,0.04") | {"relative": "0.004,0.016,0.032"}


class Session:
    """The model, its text, and what is measured on them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.attention = Attention()
        run.register(self.attention)
        dtype = args.dtype or ("float32" if self.device.type == "cpu" else "bfloat16")
        model = AutoModelForCausalLM.from_pretrained(
            args.model, dtype=getattr(torch, dtype), attn_implementation=run.NAME
        )
        self.model = model.to(self.device).eval()
        self.layers = range(model.config.num_hidden_layers)
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.origin = provenance(self.device)
        self.rows = Rows(args.json, args.fresh, self.origin)
        self.identity = {"model": args.model, "dtype": dtype}
        self.files = text_files(args.text)
        self.placements = ("end", "scattered") if args.placement == "both" else (args.placement,)
        rng, sequences = random.Random(args.seed), self.placements * args.sequences
        self.samples = [self.make_sample(self.files, args.length, placement, rng) for placement in sequences]
        self._others: dict[str, list[Sample]] = {}
        self._captured: dict[str, dict[int, Captured]] = {}

    def make_sample(self, files: list[Path], length: int, placement: str, rng: random.Random) -> Sample:
        """A sequence, on the device; the shorter it is the fewer notes it has."""
        args, bos = self.args, self.tokenizer.bos_token_id
        bos = self.model.config.bos_token_id if bos is None else bos
        notes, recalls = (max(1, count * length // args.length) for count in (args.notes, args.recalls))
        sample = run.make_sample(self.tokenizer, bos, files, length, placement, notes, recalls, rng)
        return replace(sample, tokens=sample.tokens.to(self.device))

    def others(self, purpose: str, length: int) -> list[Sample]:
        """Sequences of a `purpose`, one per placement, from files that no evaluated sequence has text of."""
        if purpose not in self._others:
            used = {file for sample in self.samples for file in sample.files}
            files, rng = [file for file in self.files if file not in used], random.Random(f"{purpose} {self.args.seed}")
            self._others[purpose] = [self.make_sample(files, length, placement, rng) for placement in self.placements]
        return self._others[purpose]

    def captured(self, sample: Sample) -> dict[int, Captured]:
        """What attention gets in every layer of a dense prefill; of two sequences, for memory's sake."""
        if sample.digest not in self._captured:
            for digest in list(self._captured)[:-1]:
                del self._captured[digest]
            self._captured[sample.digest] = capture(self.model, sample.tokens, self.layers, self.device)
        return self._captured[sample.digest]

    def configs(self, rule: Rule) -> tuple[list[SaleConfig], dict[str, Any]]:
        """A config for every layer, and what a row says of where their thresholds are from."""
        if not rule.calibrated:
            return [rule.config] * len(self.layers), {}
        samples = self.others("calibration", self.args.calibration_length)
        how = {"calibrated on": [sample.digest for sample in samples]}
        row = self.rows.once({"kind": "calibration"} | self.identity | rule.fields | how, partial(self.calibrate, rule))
        heads = [torch.tensor(row["thresholds"][str(layer)], device=self.device) for layer in self.layers]
        return [rule.config.with_options(threshold=threshold) for threshold in heads], how

    def calibrate(self, rule: Rule) -> dict[str, Any]:
        """The rest of a row of calibration."""
        samples = self.others("calibration", self.args.calibration_length)
        captured = [self.captured(sample) for sample in samples]
        taus = run.calibrate(captured, rule.config, rule.start, rule.threshold, not rule.absolute)
        return {
            "tokens": samples[0].tokens.shape[1],
            "thresholds": {str(layer): heads for layer, heads in taus.items()},
            "dense heads": sum(tau == 0 for heads in taus.values() for tau in heads),
        }

    def quality(self, rules: list[Rule]) -> Iterator[dict[str, Any]]:
        """A row per sequence for dense attention, and then for every rule."""
        for number, sample in enumerate(self.samples):
            identity = {"kind": "quality", "sequence": sample.digest} | self.identity
            dense = self.rows.once(identity | {"rule": "dense"}, partial(self.evaluate, number, sample, None, None))
            yield dense
            for rule in rules:
                configs, how = self.configs(rule)
                measure = partial(self.evaluate, number, sample, configs, dense)
                yield self.rows.once(identity | rule.fields | how, measure)

    def evaluate(
        self, number: int, sample: Sample, configs: list[SaleConfig] | None, dense: dict[str, Any] | None
    ) -> dict[str, Any]:
        """The rest of a row of quality; `dense` is the row of dense attention."""
        stats = self.attention.stats
        stats.clear()
        self.attention.configs = configs
        loss, exact = run.evaluate(self.model, sample)
        self.attention.configs = None
        kept = sum(int(each.kept_blocks.sum()) for each in stats)
        visible = sum(int(each.visible_blocks.sum()) for each in stats)
        paths = Counter(each.describe() for each in stats) or {"sdpa": len(self.layers)}
        recall = exact / sample.recalls
        return {
            "sample": number,
            "placement": sample.placement,
            "tokens": sample.tokens.shape[1],
            "density": kept / visible if stats else 1.0,
            "dropped": sum(int(each.dropped_blocks.sum()) for each in stats),
            "loss": loss,
            "rise": loss - (loss if dense is None else dense["loss"]),
            "recall": recall,
            "recall over dense": recall - (recall if dense is None else dense["recall"]),
            "exact recall": f"{exact} of {sample.recalls}",
            "path": ", ".join(f"{path} ({count} layers)" for path, count in paths.items()),
        }

    def needles(self, rules: list[Rule]) -> Iterator[dict[str, Any]]:
        """A row per sequence and rule: of how many needle rows the key's block is kept."""
        for sample in self.others("needles", self.args.needle_length):
            found: dict[Any, Any] = {}
            for rule in rules:
                configs, how = self.configs(rule)
                identity = {"kind": "needles", "sequence": sample.digest} | self.identity | rule.fields | how
                yield self.rows.once(identity, partial(self.count_needles, sample, configs, found))

    def count_needles(self, sample: Sample, configs: list[SaleConfig], found: dict[Any, Any]) -> dict[str, Any]:
        """The rest of a row of needles; `found` holds the needles of a layer, which few fields of a config move."""
        counts, kept, visible = [], 0, 0
        for (layer, captured), config in zip(self.captured(sample).items(), configs):
            which = layer, config.block_size, config.sink_tokens, config.local_tokens, config.min_length
            if which not in found:
                found[which] = run.find_needles(captured, config)
            hits, stats = run.kept_needles(captured, config, found[which])
            counts.append([len(hits), int(hits.sum())])
            kept += int(stats.kept_blocks.sum())
            visible += int(stats.visible_blocks.sum())
        needles, hit = (sum(column) for column in zip(*counts))
        return {
            "placement": sample.placement,
            "tokens": sample.tokens.shape[1],
            "density": kept / visible,
            "needles": needles,
            "needles kept": hit,
            "share": hit / needles if needles else 1.0,
            "needles and kept, by layer": counts,
        }

    def check_mask(self, rules: list[Rule], layers: list[int] | None) -> Iterator[dict[str, Any]]:
        """A row per rule and layer: on how many blocks the mask and the reference disagree."""
        tokens = self.samples[0].tokens[:, :CHECK_LENGTH]
        captured = capture(self.model, tokens, self.layers if layers is None else layers, self.device)
        for rule in rules:
            for layer, tensors in captured.items():
                identity = {"kind": "mask", "sequence": self.samples[0].digest, "layer": layer}
                measure = partial(run.check_mask, tensors, rule.config)
                yield self.rows.once(identity | self.identity | rule.fields, measure)


def show_quality(session: Session, rules: list[Rule]) -> None:
    """Measure, and print the table, densities at equal loss, and what half of the relative rule's density gives."""
    rows = list(session.quality(rules))
    print(placement_table(rows, QUALITY_COLUMNS))
    print(f"Paths: {'; '.join(dict.fromkeys(row['path'] for row in rows))}")
    columns = collect_points(rows, rules)
    equal, half = list(equal_loss(columns)), []
    print("\nDensity at which the loss rises by as much, and in brackets what share that is of the relative rule's:")
    print(table(["rise", "rule", *columns], [[str(row[name]) for name in ("rise", "rule", *columns)] for row in equal]))
    if any(rule.name == "relative" for rule in rules):
        half = list(half_density(columns, rules))
    if half:
        print(
            f"\nA rise of at most {RISE_LIMIT}, with recall within {RECALL_LIMIT} of dense, at {SHARE_LIMIT} or less "
            "of the density that the relative rule needs for that rise (with the share):"
        )
        print(table(["rule", *columns], [[row[name] for name in ("rule", *columns)] for row in half]))
        for column in columns:
            holds = [row["rule"] for row in half if row[column].startswith("yes")]
            print(f"{column}: holds for {', '.join(holds) or 'none'}")
    session.rows.replace_kind("equal loss", equal)
    session.rows.replace_kind("half density", half)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("model", help="folder of a transformers decoder and its tokenizer")
    add("--text", type=Path, nargs="+", required=True, help="folders or files of text the model has not seen")
    add("--length", type=int, default=32768, help="tokens of a sequence")
    add("--placement", choices=("end", "scattered", "both"), default="both", help="where the recall lines stand")
    add("--sequences", type=int, default=1, help="sequences of every placement")
    add("--notes", type=int, default=64, help="notes in a sequence")
    add("--recalls", type=int, default=48, help="notes that are recalled")
    add("--rules", help=f"what is measured, or none; default: {RULES}")
    add("--rule", choices=THRESHOLDS, help="instead of --rules: the rule that is measured")
    add("--thresholds", help="instead of --rules: comma-separated thresholds")
    add("--block-size", default="64,64", help="query rows and keys of a block")
    add("--sink-tokens", type=int, default=SaleConfig.sink_tokens, help="first keys that are always kept")
    add("--local-tokens", type=int, default=SaleConfig.local_tokens, help="last keys that are always kept")
    add("--min-length", type=int, default=MIN_LENGTH, help="rows before this one are dense")
    add("--calibration-length", type=int, default=8192, help="tokens of a sequence that thresholds are calibrated on")
    add("--needles", action="store_true", help="count needle rows too; with --rules none, instead")
    add("--needle-rules", default=NEEDLE_RULES, help=f"default: {NEEDLE_RULES}")
    add("--needle-length", type=int, default=16384, help="tokens of a sequence whose needle rows are counted")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on a CPU, else bfloat16")
    add("--json", type=Path, metavar="PATH", help="keep the rows there")
    add("--fresh", action="store_true", help="measure what is in --json again")
    add("--check-mask", action="store_true", help="compare masks with the reference at 8K tokens, and stop")
    add("--layers", help="layers of --check-mask, comma-separated; default: all")
    args = parser.parse_args(arguments)
    single = args.rule or args.thresholds
    if single and args.rules is not None:
        parser.error("--rule and --thresholds are instead of --rules")
    if args.rules is None and (single or args.check_mask):
        name = args.rule or "scan"
        args.rules = ":".join([name, *(args.thresholds or THRESHOLDS[name]).split(",")])
    common = SaleConfig(
        min_length=args.min_length,
        block_size=tuple(map(int, args.block_size.split(","))),
        sink_tokens=args.sink_tokens,
        local_tokens=args.local_tokens,
    )
    try:
        args.rules = parse_rules(RULES if args.rules is None else args.rules, common)
        args.needle_rules = parse_rules(args.needle_rules, common)
    except ValueError as error:
        parser.error(str(error))
    args.calibration_length, args.needle_length = (
        min(length, args.length) for length in (args.calibration_length, args.needle_length)
    )
    for rule in (*args.rules, *args.needle_rules):
        if rule.calibrated and args.calibration_length <= rule.config.min_length:
            parser.error(f"--calibration-length must be above --min-length, got {args.calibration_length} tokens")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json {args.json} is in no folder there is")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for; 1 if `--check-mask` finds a difference that is no tie."""
    args = parse(arguments)
    session, wrong = Session(args), False
    if args.check_mask:
        rows = list(session.check_mask(args.rules, args.layers and list(map(int, args.layers.split(",")))))
        print(
            table(
                list(CHECK_COLUMNS), [[format(row[name], form) for name, form in CHECK_COLUMNS.items()] for row in rows]
            )
        )
        wrong = any(row["differing"] > row["ties"] for row in rows)
    elif args.rules:
        show_quality(session, args.rules)
    if args.needles and not args.check_mask:
        rows = list(session.needles(args.needle_rules))
        print(f"\nRows of which one far key takes {run.NEEDLE_SHARE} or more, and the share that keeps its block:")
        print(placement_table(rows, NEEDLE_COLUMNS))
    print(
        ", ".join(f"{name} {session.origin[name]}" for name in ("device", "torch", "triton", "transformers", "commit"))
    )
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
