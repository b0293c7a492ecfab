# SPDX-License-Identifier: BSD-3-Clause
"""Loss, recall and density of a model with one threshold, and with thresholds calibrated per layer and head.

    python examples/measure_calibration.py MODEL --text FOLDER --length 32768 --json calibration.json

Calibrates both rules to every target on sequences of real text with notes and recall lines (see measure_quality.py),
scattered through them, and measures on others, made of other files: two kinds, with the recall lines at the end or
scattered. Reports how long each calibration took and, as the transfer report, the errors on plain text without notes.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from quality_model import Sample, evaluate, make_sample, text_tokens
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import sale_flex
import sale_flex.integrations.transformers as sale_hf
from sale_flex import Calibration, SaleConfig
from sale_flex._console.provenance import provenance
from sale_flex.bench.model import text_files

UNCALIBRATED = {"mass": (0.01, 0.02), "relative": (0.008, 0.032)}
PLACEMENTS = ("end", "scattered")


def measure(model: Any, samples: list[Sample], config: SaleConfig | Calibration | None) -> dict[str, Any]:
    """Mean loss, exact recalls and density by placement; dense for None."""
    model.set_attn_implementation("sdpa" if config is None else "sale_flex")
    row: dict[str, Any] = {}
    for placement in PLACEMENTS:
        if config is not None:
            sale_hf.configure(model, config)
        some = [sample for sample in samples if sample.placement == placement]
        results = [evaluate(model, sample) for sample in some]
        row[placement] = {
            "loss": sum(loss for loss, _ in results) / len(results),
            "recall": sum(exact for _, exact in results) / sum(sample.recalls for sample in some),
            "density": 1.0 if config is None else sale_hf.stats(model).density,
        }
    return row


def report(name: str, row: dict[str, Any], dense: dict[str, Any]) -> None:
    """Print a line of the table."""
    cells = [
        " / ".join(f"{row[place]['density']:.3f}" for place in PLACEMENTS),
        " / ".join(f"{row[place]['loss'] - dense[place]['loss']:+.4f}" for place in PLACEMENTS),
        " / ".join(f"{row[place]['recall']:.3f}" for place in PLACEMENTS),
    ]
    if "seconds" in row:
        cells += [
            f"{row['seconds']:.0f} s",
            f"{row['dense_heads']}",
            f"{row['error']:.3f}, {row['largest']:.3f}",
            f"{row['transfer_error']:.3f}, {row['transfer_largest']:.3f}",
        ]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("model", help="folder or name of a model")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="files or folders the model has not seen")
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--sequences", type=int, default=2, help="of each placement, to measure on")
    parser.add_argument("--calibration-sequences", type=int, default=2)
    parser.add_argument("--notes", type=int, default=64)
    parser.add_argument("--recalls", type=int, default=48)
    parser.add_argument("--targets", default="0.05,0.1,0.2")
    parser.add_argument("--rules", default="mass,relative")
    parser.add_argument("--min-length", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the figures, after each")
    args = parser.parse_args(arguments)
    logging.set_verbosity_error()
    sale_hf.register()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, attn_implementation="sale_flex", dtype=dtype)
    model = model.to(device).eval()

    rng, bos, files = random.Random(args.seed), model.config.bos_token_id, text_files(args.text)
    made: list[Sample] = []
    for placement in [*PLACEMENTS * args.sequences, *["scattered"] * args.calibration_sequences]:
        made.append(make_sample(tokenizer, bos, files, args.length, placement, args.notes, args.recalls, rng))
        files = [file for file in files if file not in made[-1].files]
    count = len(PLACEMENTS) * args.sequences
    samples = [Sample(x.placement, x.tokens.to(device), x.recall, x.recalls, x.files) for x in made[:count]]
    batches = [sample.tokens for sample in made[count:]]
    plain, _, _ = text_tokens(tokenizer, files, args.length - 1, rng)
    transfer = [torch.tensor([[bos, *plain]])]

    dense = measure(model, samples, None)
    rows: dict[str, Any] = {"dense": dense}
    report("dense", dense, dense)
    for rule in args.rules.split(","):
        config = SaleConfig.from_options(rule, min_length=args.min_length)
        for threshold in UNCALIBRATED[rule]:
            name = f"{rule}, {threshold} in every head"
            one = config.with_options(threshold=threshold)
            rows[name] = measure(model, samples, one)
            report(name, rows[name], dense)
        for target in map(float, args.targets.split(",")):
            name = f"{rule}, calibrated to {target}"
            begin = time.perf_counter()
            found = sale_flex.calibrate(model, batches, config=config, target=target)
            seconds = time.perf_counter() - begin
            elsewhere = sale_flex.calibration.evaluate(model, found, transfer)
            rows[name] = measure(model, samples, found) | {
                "seconds": seconds,
                "dense_heads": int((found.thresholds == 0).sum()),
                "error": float(found.on.errors.mean()),
                "largest": float(found.on.errors.max()),
                "calibration_rise": found.on.rise,
                "transfer_error": float(elsewhere.errors.mean()),
                "transfer_largest": float(elsewhere.errors.max()),
                "transfer_rise": elsewhere.rise,
                "thresholds": found.thresholds.tolist(),
            }
            report(name, rows[name], dense)
            if args.json is not None:
                args.json.write_text(json.dumps({"rows": rows, **provenance(device)}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
