# SPDX-License-Identifier: BSD-3-Clause
"""Train the demo's language model: a 3.7 M parameter Llama that reads Python and recalls notes.

The text is the running Python's standard library, some modules held out. In a part of the
sequences lines ``# note KEY = VALUE`` stand at random places and ``# recall KEY = VALUE`` later,
so that attention has to look far back and at a few keys only. Sequences are assembled on the
device: a window of the corpus, and lines put in where it breaks a line. They start short, where
looking up is learned fast, and end at the length the demo uses.

One H200 needs about four minutes; the second command needs a minute and learns next to nothing::

    python examples/train_recall_lm.py out/recall-lm
    python examples/train_recall_lm.py out/smoke --smoke --device cpu

The folder it writes loads with ``AutoModelForCausalLM`` and ``PreTrainedTokenizerFast``. It exits
1 when recall on held-out text is below 0.95 at any of the evaluated lengths.
"""

import argparse
import contextlib
import json
import platform
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.masking_utils import AttentionMaskInterface

from sale_flex.demo.prompt import (
    BOS,
    EOS,
    EQUALS,
    HELD_OUT,
    NOTE,
    RECALL,
    build_prompt,
    held_out_texts,
    line_breaks,
    random_hex,
    score,
    standard_library,
)

VOCABULARY = 2048
MAX_BYTES = 8_000_000  # the folder ships inside the package
SKIPPED = {"site-packages", "dist-packages", "encodings", "pydoc_data", "lib2to3", "__pycache__"}
"""Folders without prose or code worth learning: tables, generated text, grammars."""
RANDOM_WEIGHT, VALUE_WEIGHT = 0.2, 4.0
"""Loss weights of digits that nobody can know, and of recalled values; other tokens weigh 1."""


@dataclass(frozen=True)
class Phase:
    """A part of training: `batch` sequences of `length` tokens, for `share` of the run."""

    length: int
    batch: int
    share: float

    @staticmethod
    def parse(text: str) -> "Phase":
        """Read ``LENGTHxBATCH:SHARE``."""
        size, share = text.split(":")
        length, batch = size.split("x")
        return Phase(int(length), int(batch), float(share))


def causal_attention(module, query, key, value, attention_mask, scaling=None, **_):
    """Dense causal attention without a mask tensor; returns `[B, S, Hq, D]`."""
    out = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("causal", causal_attention)
AttentionMaskInterface.register("causal", lambda *_, **__: None)


def read_corpus(limit: int | None) -> list[str]:
    """Standard library sources, folder by folder, without the held-out modules and their tests."""
    root = standard_library()
    held_out = {f"{name}.py" for name in HELD_OUT} | {f"test_{name}.py" for name in HELD_OUT}
    texts, size = [], 0
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if path.name in held_out or SKIPPED & set(relative.parts):
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:  # a few tests are in another encoding on purpose
            continue
        texts.append(text)
        size += len(text)
        if limit is not None and size >= limit:
            break
    return texts


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE in which every digit is a token: a hex key splits the same way anywhere."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Batches:
    """Assembles training sequences on the device, without a loop over rows.

    A row is `BOS`, then a window of the corpus into which note and recall lines are put. A line
    has no newline at its end: it goes in before a token that begins with one, so that the tokens
    are those of the resulting string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        texts: list[str],
        device: str,
        seed: int,
        pool: int,
        noted: float,
    ):
        """Tokenise `texts` and `pool` hex strings; a share `noted` of the rows has notes."""
        encoded = tokenizer.encode_batch(texts)
        stream = torch.cat([torch.tensor([*e.ids, EOS], dtype=torch.int32) for e in encoded])
        self.stream = stream.to(device)
        is_break = torch.zeros(VOCABULARY, dtype=torch.bool)
        is_break[list(line_breaks(tokenizer))] = True
        index = torch.where(is_break[stream.long()], torch.arange(len(stream)), len(stream))
        # index of the first token at or after each place that begins with a newline
        self.next_break = index.flip(0).cummin(0).values.flip(0).to(device)
        # Letters of a hex string may share a token, so that lines differ in length.
        strings = random_hex(random.Random(seed), pool)
        digits = [e.ids for e in tokenizer.encode_batch([f" {string}" for string in strings])]
        self.hex, self.hex_length = self.table(digits, device)
        heads = [tokenizer.encode(head).ids for head in (NOTE, RECALL)]
        self.heads, self.head_length = self.table(heads, device)
        self.equals = torch.tensor(tokenizer.encode(EQUALS).ids, device=device)
        self.noted = noted
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    @staticmethod
    def table(rows: list[list[int]], device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Lists as one tensor, filled up at their ends, and their lengths."""
        lengths = torch.tensor([len(row) for row in rows], device=device)
        width = max(map(len, rows))
        filled = [row + [BOS] * (width - len(row)) for row in rows]
        return torch.tensor(filled, device=device), lengths

    def uniform(self, *shape: int) -> torch.Tensor:
        """Random numbers in [0, 1)."""
        return torch.rand(*shape, device=self.device, generator=self.generator)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        """Random integers in [0, high)."""
        return torch.randint(high, shape, device=self.device, generator=self.generator)

    def lines(self, rows: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Note lines, then the recall lines of the same keys.

        Returns:
            Tokens `[rows, 2 * count, W]` with gaps, and of the same shape which of them count and
            their loss weights.
        """
        keys, values = (self.integers(len(self.hex), rows, count).repeat(1, 2) for _ in range(2))
        kind = torch.arange(2, device=self.device).repeat_interleave(count).expand(rows, -1)
        one = torch.ones(kind.shape, device=self.device)
        value_weight = torch.where(kind == 1, VALUE_WEIGHT, RANDOM_WEIGHT)
        equals = self.equals.expand(*kind.shape, -1)
        parts = (
            (self.heads[kind], self.head_length[kind], one),
            (self.hex[keys], self.hex_length[keys], RANDOM_WEIGHT * one),
            (equals, torch.full_like(kind, len(self.equals)), one),
            (self.hex[values], self.hex_length[values], value_weight),
        )
        tokens, used, weights = [], [], []
        for part, length, weight in parts:
            tokens.append(part)
            used.append(torch.arange(part.shape[-1], device=self.device) < length[..., None])
            weights.append(weight[..., None].expand(part.shape))
        return torch.cat(tokens, -1), torch.cat(used, -1), torch.cat(weights, -1)

    def __call__(self, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens int64 `[rows, length]` and loss weights float32 of the same shape."""
        pairs = min(96, length // 48)
        tokens, used, weights = self.lines(rows, pairs)
        # Few and many notes alike; a quarter of them is never asked for.
        dense = self.uniform(rows, 1) * (self.uniform(rows, 1) < self.noted)
        has_note = self.uniform(rows, pairs) < dense
        has_recall = has_note & (self.uniform(rows, pairs) < 0.75)
        used &= torch.cat([has_note, has_recall], 1)[..., None]
        sizes = used.sum(-1)
        room = length - 1 - sizes.sum(-1, keepdim=True)  # text tokens of each row

        start = self.integers(len(self.stream) - length, rows, 1)
        note_at = self.uniform(rows, pairs)
        recall_at = note_at + (1 - note_at) * self.uniform(rows, pairs)
        recall_at = torch.where(self.uniform(rows, pairs) < 0.4, 1.0, recall_at)
        wanted = (torch.cat([note_at, recall_at], 1) * room).long()
        at = torch.minimum(self.next_break[start + wanted] - start, room)

        # Order lines by place; a note goes before a recall line at the same place.
        tie = torch.cat([torch.zeros_like(note_at), 0.5 + 0.4 * self.uniform(rows, pairs)], 1)
        order = (at + tie.double()).argsort(-1)
        before = sizes.gather(1, order).cumsum(-1) - sizes.gather(1, order)
        line_start = 1 + at + torch.zeros_like(at).scatter(1, order, before)

        place = torch.arange(length, device=self.device).expand(rows, -1)
        shift = torch.zeros(rows, length + 1, dtype=torch.long, device=self.device)
        shift.scatter_add_(1, at, sizes)
        text_to = 1 + place + shift.cumsum(-1)[:, :length]
        # One column more than needed: what does not count is written there.
        text_to = torch.where(place < room, text_to, length)
        line_to = line_start[..., None] + used.cumsum(-1) - 1
        line_to = torch.where(used, line_to, length).flatten(1)

        out = torch.full((rows, length + 1), BOS, dtype=torch.long, device=self.device)
        out.scatter_(1, text_to, self.stream[start + place].long())
        out.scatter_(1, line_to, tokens.flatten(1))
        weight = torch.ones(rows, length + 1, device=self.device)
        weight.scatter_(1, line_to, weights.flatten(1))
        return out[:, :length].contiguous(), weight[:, :length].contiguous()


def weighted_loss(hidden, head, targets, weights):
    """Mean cross entropy of `hidden [N, C]` through `head [V, C]`, weighted by `weights [N]`."""
    losses = F.cross_entropy((hidden @ head.to(hidden.dtype).T).float(), targets, reduction="none")
    return (losses * weights).sum() / weights.sum(), losses.detach()


def evaluate(
    model: LlamaForCausalLM, tokenizer: Tokenizer, texts: list[str], tokens: int, recalls: int
) -> dict[str, float]:
    """Loss and recall on the demo's own prompts, other seeds, with at least `recalls` recalls."""
    notes = max(4, min(40, tokens // 100))
    scores = []
    for seed in range(1000, 1000 - (-recalls // notes)):
        prompt = build_prompt(tokenizer, texts, tokens=tokens, notes=notes, seed=seed)
        ids = torch.tensor([prompt.tokens], device=model.device)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            scores.append(score(model(input_ids=ids, use_cache=False).logits[0], prompt))
    return {
        "loss": sum(s.loss for s in scores) / len(scores),
        "recall": sum(s.recall for s in scores) / len(scores),
        "recalls": notes * len(scores),
    }


def build_model(args: argparse.Namespace, longest: int) -> LlamaForCausalLM:
    """A Llama with random weights, 3.7 M of them by default."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=args.hidden // 4,
        max_position_embeddings=longest,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        attn_implementation="causal",
    )
    return LlamaForCausalLM(config)


def progress_of(tokens: int, begun: float, args: argparse.Namespace) -> float:
    """Share of the run that is over: of its tokens, or of its seconds if those run out first."""
    return max(tokens / args.tokens, (time.perf_counter() - begun) / args.seconds)


def phase_at(phases: list[Phase], progress: float) -> Phase:
    """The phase that a share of the run falls into."""
    reached = 0.0
    for phase in phases:
        reached += phase.share
        if progress < reached:
            return phase
    return phases[-1]


def learning_rate(peak: float, progress: float) -> float:
    """Warm up over 2 % of the run, hold, fall to zero over the last 40 %."""
    return peak * min(1.0, (progress + 1e-4) / 0.02) * min(1.0, max(0.0, 1 - progress) / 0.4)


def train(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    batches: Batches,
    texts: list[str],
    args: argparse.Namespace,
) -> Iterator[dict[str, float]]:
    """Train until tokens or seconds run out; yields a record for every progress line."""
    cuda = args.device == "cuda"
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=cuda,
    )
    loss_function = weighted_loss
    if cuda:
        loss_function = torch.compile(weighted_loss, dynamic=False)
        for layer in model.model.layers:  # one layer's program serves all: compiling is short
            layer.compile(dynamic=False)
    begun = time.perf_counter()
    seen, step, next_line = 0, 0, 0.0
    while (progress := progress_of(seen, begun, args)) < 1:
        phase = phase_at(args.phases, progress)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.lr, progress)
        tokens, weights = batches(phase.batch, phase.length)
        context = torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext()
        with context:
            hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
            loss, losses = loss_function(
                hidden.flatten(0, 1),
                model.lm_head.weight,
                tokens[:, 1:].flatten(),
                weights[:, 1:].flatten(),
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += tokens.numel()
        step += 1
        if progress >= next_line or progress_of(seen, begun, args) >= 1:
            next_line = progress + args.line_every
            flat = weights[:, 1:].flatten()
            with context:
                held = evaluate(model, tokenizer, texts, phase.length, 32)
            yield {
                "step": step,
                "tokens": seen,
                "seconds": round(time.perf_counter() - begun, 1),
                "length": phase.length,
                "text_loss": losses[flat == 1].mean().item(),
                "value_loss": losses[flat == VALUE_WEIGHT].mean().item(),
                "held_out_loss": held["loss"],
                "held_out_recall": held["recall"],
            }


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> int:
    """Write the bf16 model and its tokenizer; returns the bytes of both."""
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    size = sum((folder / name).stat().st_size for name in ("model.safetensors", "tokenizer.json"))
    assert size < MAX_BYTES, f"{folder} holds {size} bytes, more than the {MAX_BYTES} it may ship with"
    return size


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=200, help="most seconds of training")
    parser.add_argument("--tokens", type=float, default=400e6, help="tokens to train on")
    parser.add_argument(
        "--phases",
        nargs="+",
        type=Phase.parse,
        default=[Phase(512, 128, 0.2), Phase(2048, 32, 0.2), Phase(8192, 8, 0.6)],
        help="LENGTHxBATCH:SHARE of the run, in order",
    )
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--noted", type=float, default=0.6, help="share of sequences with notes")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path, help="folder of an earlier run to go on from")
    parser.add_argument("--evaluate", nargs="+", type=int, default=[2048, 4096, 6144, 8192])
    parser.add_argument("--line-every", type=float, default=0.05, help="share of the run")
    parser.add_argument("--corpus", type=int, help="read no more than this many characters")
    parser.add_argument("--smoke", action="store_true", help="a tiny run to see that it works")
    args = parser.parse_args(argv)
    if args.smoke:
        args.tokens, args.hidden, args.layers, args.corpus = 60e3, 64, 2, 2_000_000
        args.phases = [Phase(512, 4, 0.5), Phase(1024, 2, 0.5)]
        args.evaluate, args.line_every = [1024], 0.25
    return args


def main(argv: list[str] | None = None) -> int:
    """Train, save, evaluate, report."""
    args = parse_arguments(argv)
    began = time.perf_counter()
    torch.manual_seed(args.seed)
    texts, held_out = read_corpus(args.corpus), held_out_texts()
    if args.resume:
        tokenizer = Tokenizer.from_file(str(args.resume / "tokenizer.json"))
        model = LlamaForCausalLM.from_pretrained(args.resume, attn_implementation="causal", dtype=torch.float32)
    else:
        tokenizer = train_tokenizer(texts[::4])  # a quarter is plenty for 2,048 pieces
        longest = max(*args.evaluate, *(phase.length for phase in args.phases))
        model = build_model(args, longest)
    model.to(args.device)
    pool = 1 << (12 if args.smoke else 18)
    batches = Batches(tokenizer, texts, args.device, args.seed, pool, args.noted)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{parameters:,} parameters, {len(texts)} files, {len(batches.stream):,} tokens, "
        f"prepared in {time.perf_counter() - began:.1f} s",
        flush=True,
    )
    records = []
    try:
        for record in train(model, tokenizer, batches, held_out, args):
            records.append(record)
            print(
                "  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items()),
                flush=True,
            )
    except KeyboardInterrupt:
        print("interrupted: saving what there is", file=sys.stderr)
    size = save(model, tokenizer, args.out)
    results = {n: evaluate(model, tokenizer, held_out, n, 64) for n in args.evaluate}
    report = {
        "seed": args.seed,
        "tokens": records[-1]["tokens"] if records else 0,
        "arguments": {name: getattr(args, name) for name in ("tokens", "seconds", "lr", "noted")},
        "parameters": parameters,
        "bytes": size,
        "corpus_tokens": len(batches.stream),
        "held_out": HELD_OUT,
        "phases": [vars(phase) for phase in args.phases],
        "held_out_by_length": results,
        "seconds": round(time.perf_counter() - began, 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "records": records,
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    for length, result in results.items():
        print(f"{length} tokens: held-out loss {result['loss']:.3f}, recall {result['recall']:.3f}")
    print(f"{args.out}: {size:,} bytes, {report['seconds']} s in all")
    good = all(result["recall"] >= 0.95 for result in results.values())
    return 0 if good or args.smoke else 1


if __name__ == "__main__":
    raise SystemExit(main())
