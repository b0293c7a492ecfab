# SPDX-License-Identifier: BSD-3-Clause
"""Time to first token, peak memory and recall of whole models of transformers, dense and with sale_flex.

    python examples/measure_models.py generate MODEL --text FOLDER --length 32768 --json generate.json
    python examples/measure_models.py prefill --length 131072 --layers 32 --density 0.05 --json prefill.json

``generate`` reads real text with notes in it through ``model.generate``: of every recall line at the end of a sequence
(see measure_quality.py) the value is generated, after a prompt that ends before it. ``prefill`` builds a model of the
shape of Llama-3.1-8B with random weights. Random weights have no sparsity, so the threshold is searched for the density
asked for: what it shows is what the plumbing costs, not what sale_flex keeps of a trained model.

Each implementation is warmed up before it is timed; rounds are interleaved and medians are printed.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from quality_model import make_sample
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import sale_flex.integrations.transformers as sale_hf
from sale_flex import Mass, SaleConfig
from sale_flex._console.provenance import provenance
from sale_flex.bench.model import text_files

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
}


def synchronize() -> None:
    """Wait for the device, if there is one to wait for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of a call, and the most bytes it had allocated beyond what was there before."""
    synchronize()
    before = 0
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    call()
    synchronize()
    seconds = time.perf_counter() - begin
    return seconds, torch.cuda.max_memory_allocated() - before if torch.cuda.is_available() else 0.0


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds and GiB of every call, a first time that compiles not counted."""
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    first = {}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            measured = timed(call)
            if turn == 0:
                first[name] = measured[0]
                print(f"# {name}: first call {measured[0]:.1f} s", file=sys.stderr, flush=True)
            else:
                results[name].append(measured)
    return {
        name: {
            "seconds": statistics.median(x for x, _ in values),
            "gib": statistics.median(x for _, x in values) / 2**30,
            "first_seconds": first[name],
        }
        for name, values in results.items()
    }


class Switched:
    """A model that runs as several implementations, one at a time."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.compiled: Any = None

    def use(self, name: str) -> Any:
        """The model as ``sdpa``, ``flex_attention``, ``sale_flex`` or ``sale_flex compiled``."""
        implementation, _, compiled = name.partition(" ")
        if self.model.config._attn_implementation != implementation:
            self.model.set_attn_implementation(implementation)
        self.model._compiled_call_impl = None
        if compiled:
            if self.compiled is None:
                self.model.compile(fullgraph=True)
                self.compiled = self.model._compiled_call_impl
            self.model._compiled_call_impl = self.compiled
        return self.model


@torch.inference_mode()
def measure_generate(args: argparse.Namespace) -> dict[str, Any]:
    """Time to first token and recalls of a trained model."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, attn_implementation="sale_flex", dtype=dtype).to(device)
    sale_hf.configure(model.eval(), SaleConfig(Mass(args.threshold), min_length=args.min_length))
    switched = Switched(model)
    files, bos = text_files([Path(args.text)]), model.config.bos_token_id
    made = make_sample(tokenizer, bos, files, args.length, "end", args.notes, args.recalls, random.Random(args.seed))
    tokens = made.tokens.to(device)
    prompts: list[tuple[Tensor, list[int]]] = []
    for number in range(made.recalls):
        places = (made.recall == number).nonzero()[:, 0]
        first, last = int(places[0]), int(places[-1])
        prompts.append((tokens[:, :first], tokens[0, first : last + 1].tolist()))
    names = args.implementations.split(",")
    longest = prompts[-1][0]

    def first_token(name: str) -> Callable[[], Any]:
        return lambda: switched.use(name).generate(
            longest, attention_mask=torch.ones_like(longest), max_new_tokens=1, do_sample=False
        )

    times = interleaved({name: first_token(name) for name in names}, args.rounds)
    answers: dict[str, list[list[int]]] = {}
    for name in names:
        sale_hf.reset_stats(model)
        answers[name] = []
        for ids, _ in prompts:
            out = switched.use(name).generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.new_tokens, do_sample=False
            )
            answers[name].append(out[0, ids.shape[1] :].tolist())
        density = sale_hf.stats(model).density if name.startswith(sale_hf.NAME) else 1.0
        right = sum(got[: len(value)] == value for got, (_, value) in zip(answers[name], prompts))
        same = sum(got == dense for got, dense in zip(answers[name], answers[names[0]]))
        times[name] |= {"recalled": right, "of": len(prompts), "same_tokens": same, "density": density}
        print(
            f"{name:20} first token {times[name]['seconds'] * 1000:9.1f} ms  {times[name]['gib']:6.2f} GiB  density "
            f"{density:.3f}  recalled {right} of {len(prompts)}  all {args.new_tokens} tokens as {names[0]}: {same}",
            flush=True,
        )
    return times


@torch.inference_mode()
def measure_prefill(args: argparse.Namespace) -> dict[str, Any]:
    """Time to first token and memory of a large model with random weights."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = LLAMA_8B if args.shape is None else LLAMA_8B | json.loads(args.shape)
    config = LlamaConfig(**shape, num_hidden_layers=args.layers, max_position_embeddings=max(args.length, 8192))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM._from_config(config, attn_implementation="sale_flex").eval()
    torch.set_default_dtype(before)
    ids = torch.randint(config.vocab_size, (1, args.length), device=device)
    switched = Switched(model)

    def first_token(name: str) -> Callable[[], Any]:
        return lambda: switched.use(name).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, pad_token_id=0
        )

    low, high = 1e-5, 1.0
    for _ in range(args.search):
        threshold = (low * high) ** 0.5
        sale_hf.configure(model, SaleConfig(Mass(threshold)))
        first_token("sale_flex")()
        density = sale_hf.stats(model).density
        print(f"# threshold {threshold:.5f}: density {density:.4f}", file=sys.stderr, flush=True)
        low, high = (threshold, high) if density > args.density else (low, threshold)
    times = interleaved({name: first_token(name) for name in args.implementations.split(",")}, args.rounds)
    sale_hf.reset_stats(model)
    first_token("sale_flex")()
    stats = sale_hf.stats(model)
    mask, attention = (sum(getattr(one, name) for one in stats.layers) for name in ("mask_ms", "attention_ms"))
    for name, row in times.items():
        row["density"] = stats.density if name.startswith("sale_flex") else 1.0
        print(f"{name:20} first token {row['seconds']:7.3f} s  beyond weights {row['gib']:6.2f} GiB", flush=True)
    whole = times["sale_flex"]["seconds"] * 1000
    print(f"sale_flex, threshold {threshold:.5f}, density {stats.density:.4f}, {args.layers} layers:")
    print(f"  choosing blocks {mask:9.1f} ms  {mask / whole:6.1%}")
    print(f"  attention       {attention:9.1f} ms  {attention / whole:6.1%}")
    print(f"  everything else {whole - mask - attention:9.1f} ms  {1 - (mask + attention) / whole:6.1%}")
    return times | {"stages": {"mask_ms": mask, "attention_ms": attention, "threshold": threshold}}


def main(arguments: list[str] | None = None) -> int:
    """Print the measurements."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    generate.add_argument("model", help="folder or name of a model")
    generate.add_argument("--text", required=True, help="folder of text the model has not seen")
    generate.add_argument("--length", type=int, default=32768)
    generate.add_argument("--notes", type=int, default=64)
    generate.add_argument("--recalls", type=int, default=24)
    generate.add_argument("--threshold", type=float, default=SaleConfig().rule.threshold)
    generate.add_argument("--min-length", type=int, default=1024)
    generate.add_argument("--new-tokens", type=int, default=16)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--implementations", default="sdpa,flex_attention,sale_flex,sale_flex compiled")
    prefill = commands.add_parser("prefill", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    prefill.add_argument("--length", type=int, default=131072)
    prefill.add_argument("--layers", type=int, default=32)
    prefill.add_argument("--density", type=float, default=0.05)
    prefill.add_argument("--search", type=int, default=8, help="steps of the search for the threshold")
    prefill.add_argument("--shape", help="fields of LlamaConfig as JSON, over those of Llama-3.1-8B")
    prefill.add_argument("--implementations", default="sdpa,sale_flex")
    for command in (generate, prefill):
        command.add_argument("--rounds", type=int, default=3)
        command.add_argument("--json", type=Path, help="where to write the figures, and what they were measured with")
    args = parser.parse_args(arguments)
    logging.set_verbosity_error()
    sale_hf.register()
    rows = (measure_generate if args.command == "generate" else measure_prefill)(args)
    if args.json is not None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        args.json.write_text(json.dumps({"rows": rows, **provenance(device)}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
