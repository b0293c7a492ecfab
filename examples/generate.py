# SPDX-License-Identifier: BSD-3-Clause
"""Generate with attn_implementation="sale_flex": a model reads a long text with notes in it and recalls one of them.

Runs the bundled model of the demo, or any decoder of transformers, densely and sparsely. Checks itself: both must
answer alike. Exits 1 if not.

    python examples/generate.py --tokens 8192
    python examples/generate.py --model meta-llama/Llama-3.1-8B --tokens 65536 --threshold 0.01
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import sale_flex.integrations.transformers as sale_hf
from sale_flex import Mass, SaleConfig
from sale_flex.bench.model import read_text
from sale_flex.demo.model import PACKAGED
from sale_flex.demo.prompt import held_out_texts

NOTE = "3f9c20"


def load(name: str | None, device: torch.device) -> tuple[Any, Any]:
    """Model and tokenizer."""
    if name is None:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(PACKAGED / "tokenizer.json"), bos_token="<s>")
    else:
        tokenizer = AutoTokenizer.from_pretrained(name)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(name or PACKAGED, attn_implementation="sale_flex", dtype=dtype)
    return model.to(device).eval(), tokenizer


def prompt(tokenizer: Any, tokens: int, texts: list[str]) -> Tensor:
    """Ids ``[1, tokens]`` of a text with a note near its beginning and the beginning of its recall at its end."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    note, recall = (
        tokenizer(text, add_special_tokens=False).input_ids
        for text in (f"\n# note a41b77 = {NOTE}\n", "\n# recall a41b77 =")
    )
    text = tokenizer("\n".join(texts), add_special_tokens=False).input_ids
    room = tokens - len(bos) - len(note) - len(recall)
    if not 64 <= room <= len(text):
        raise SystemExit(f"--tokens must leave room for 64 to {len(text)} tokens of text, got {tokens}")
    early = room // 5
    return torch.tensor([[*bos, *text[:early], *note, *text[early:room], *recall]])


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    """Print both answers, and what every layer kept."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="folder or name of a model; by default the demo's")
    parser.add_argument("--text", type=Path, nargs="+", help="files to read; by default the standard library")
    parser.add_argument("--tokens", type=int, default=8192, help="length of the prompt")
    parser.add_argument(
        "--threshold", type=float, default=SaleConfig().rule.threshold, help="share of a row's probability"
    )
    parser.add_argument("--min-length", type=int, default=1024, help="queries with fewer keys before them stay dense")
    args = parser.parse_args(arguments)

    sale_hf.register()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load(args.model, device)
    texts = held_out_texts() if args.text is None else [read_text(file) for file in args.text]
    ids = prompt(tokenizer, args.tokens, texts).to(device)
    answers = {}
    sale_hf.configure(model, SaleConfig(Mass(args.threshold), min_length=args.min_length))
    for name in ("sdpa", "sale_flex"):
        model.set_attn_implementation(name)
        for _ in range(2):  # the first call compiles
            sale_hf.reset_stats(model)
            begin = time.perf_counter()
            made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
            seconds = time.perf_counter() - begin
        answers[name] = tokenizer.decode(made[0, ids.shape[1] :]).strip()
        print(f"{name}: {answers[name]!r} after {args.tokens} tokens in {seconds:.2f} s")
    stats = sale_hf.stats(model)
    print(stats)
    right = answers["sale_flex"].startswith(NOTE)
    print(f"density {stats.density:.3f}, the note was {NOTE}: {'recalled' if right else 'not recalled'}")
    if answers["sale_flex"] != answers["sdpa"]:
        print("the sparse answer differs from the dense one; lower --threshold", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
