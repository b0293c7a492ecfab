# SPDX-License-Identifier: BSD-3-Clause
"""Thresholds for every layer and head of the bundled model, found on one module's source and tried on another's.

Runs on a CPU in less than a minute. It exits 1 when a head's error is above the target, when nothing was left out, or
when the files do not hold what was found.

    python examples/calibrate.py --length 2048 --target 0.05
"""

import argparse
import sys
import tempfile
import time

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

import sale_flex
import sale_flex.integrations.transformers as sale_hf
from sale_flex.demo.model import PACKAGED
from sale_flex.demo.prompt import held_out_texts


def main(arguments: list[str] | None = None) -> int:
    """Print the summary, and one line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int, default=2048, help="tokens of a text")
    parser.add_argument("--target", type=float, default=0.05, help="largest error of a head's output")
    parser.add_argument("--rule", choices=("mass", "relative"), default="mass", help="what selects blocks")
    args = parser.parse_args(arguments)
    sale_hf.register()
    model = AutoModelForCausalLM.from_pretrained(PACKAGED, dtype=torch.float32, attn_implementation="sale_flex")
    tokenizer = Tokenizer.from_file(str(PACKAGED / "tokenizer.json"))
    own, other, *_ = (torch.tensor([tokenizer.encode(text).ids[: args.length]]) for text in held_out_texts())
    # By default what is too short to gain time is dense; here the sparse path is what is to be seen.
    config = sale_flex.SaleConfig.from_options(args.rule, min_length=256)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = sale_flex.calibrate(model, [own], config=config, target=args.target, out=folder, transfer=[other])
        seconds = time.perf_counter() - began
        stored = sale_flex.Calibration.from_pretrained(folder)
    print(found)

    sale_hf.configure(model, stored)
    with torch.no_grad():
        model(other, use_cache=False)
    density = sale_hf.stats(model).density
    heads = found.thresholds.numel()
    print(
        f"\n{args.length} tokens: thresholds for {heads} heads in {seconds:.0f} s; the model with them keeps "
        f"{density:.3f} of the other text's blocks"
    )
    problems = []
    if bool((found.errors > args.target).any()):
        problems.append(f"an error of {found.errors.max():.4f} is above the target {args.target}")
    if not density < 1:
        problems.append("no block was left out; take a longer text or a larger target")
    if not torch.equal(stored.thresholds, found.thresholds):
        problems.append("the files hold other thresholds")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
