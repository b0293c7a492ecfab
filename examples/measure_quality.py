# SPDX-License-Identifier: BSD-3-Clause
"""Loss and recall of a language model with dense attention, and with SALE in every layer.

Real text the model has not seen carries lines ``# note KEY = VALUE`` in its first half and, later, lines
``# recall KEY = VALUE``; key and value are six random hex digits, so a value can be known only by looking its note up.
The recall lines stand at the end, or are scattered through the second half. The whole sequence goes through the model
once per threshold (teacher forcing). Loss is the mean over all tokens in nats; a recall is exact when every token of
its value is the model's first choice.

    python examples/measure_quality.py MODEL --text FOLDER --length 32768 --json quality.json

`--capture` stores the queries, keys and values that attention gets, for tests of kernels on real tensors.
`--check-mask` compares the mask, layer by layer, with the plain-torch reference, and fails if they disagree anywhere
but within 1e-5 of the threshold.
"""

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import AttentionMaskInterface

import sale_flex
from sale_flex import SaleConfig, SaleStats
from sale_flex.reference import keep_map

NAME = "sale_flex_measured"
TEXT_SUFFIXES = (".md", ".py", ".rst", ".txt")
CHECK_LENGTH = 8192  # the reference holds whole score matrices of a head
CHECK_MARGIN = 1e-5  # in logits
CHECK_COLUMNS = {"layer": "", "threshold": "", "density": ".4f", "visible": "", "differing": "", "ties": "", "path": ""}
QUALITY_COLUMNS = {"placement": "", "threshold": "", "density": ".3f", "loss": ".4f", "rise": "+.4f"}
QUALITY_COLUMNS |= {"exact recall": "", "path": ""}
"""What the tables show of a row, and how."""


@dataclass(frozen=True)
class Sample:
    """A sequence and its answers."""

    placement: str
    tokens: Tensor
    """int64 ``[1, S]``."""
    recall: Tensor
    """int64 ``[S]``: which recall line's value a token belongs to, -1 for none."""
    recalls: int


@dataclass
class Attention:
    """The attention function of every layer: dense by SDPA without a config, SALE with one."""

    config: SaleConfig | None = None
    capture: tuple[int, ...] = ()
    """Layers whose tensors `captured` takes over."""
    captured: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    stats: list[SaleStats] = field(default_factory=list)

    def __call__(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Causal attention of one unpadded sequence; see transformers' `AttentionInterface`."""
        window = options.get("sliding_window")
        if window is not None and window < key.shape[2]:
            raise NotImplementedError(f"layer {module.layer_idx} has a sliding window of {window}")
        if options.get("softcap") is not None or options.get("s_aux") is not None:
            raise NotImplementedError(f"layer {module.layer_idx} changes its scores")
        if module.layer_idx in self.capture:
            self.captured[module.layer_idx] = (query, key, value)
        if self.config is None:
            output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        else:
            result = sale_flex.sale_attention(query, key, value, self.config, scale=scaling, stats=True)
            output = result.output
            self.stats.append(result.stats)
        return output.transpose(1, 2).contiguous(), None


def register(attention: Attention) -> None:
    """Make `attention` known to transformers as ``attn_implementation=NAME``."""
    AttentionInterface.register(NAME, attention)
    # One sequence and no padding: plain causal, which needs no mask. Without a function for masks transformers would
    # pass None as well, but then for padded batches too.
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


def text_files(paths: list[Path]) -> list[Path]:
    """Files among `paths`, and the text files in the folders among them, sorted."""
    files = []
    for path in paths:
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        files += [file for file in inside if file == path or file.suffix in TEXT_SUFFIXES]
    if not files:
        raise FileNotFoundError(f"--text holds no file that ends in {', '.join(TEXT_SUFFIXES)}.")
    return files


def encode(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of `text` and the span of characters of each."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoded.input_ids, encoded.offset_mapping


def text_tokens(tokenizer: Any, files: list[Path], count: int, rng: random.Random) -> tuple[list[int], list[int]]:
    """`count` tokens of consecutive files from a random one on, and where lines may be put in: at the line breaks."""
    tokens: list[int] = []
    breaks: list[int] = []
    first = rng.randrange(len(files))
    for file in files[first:] + files[:first]:
        text = file.read_text("utf-8", errors="ignore")
        ids, spans = encode(tokenizer, text)
        breaks += [len(tokens) + i for i, (start, _) in enumerate(spans) if text[start : start + 1] == "\n"]
        tokens += ids
        if len(tokens) >= count:
            return tokens[:count], [at for at in breaks if at < count]
    raise ValueError(f"--text has only {len(tokens)} tokens and --length needs {count} of them.")


def make_sample(
    tokenizer: Any,
    bos: int | None,
    files: list[Path],
    length: int,
    placement: str,
    notes: int,
    recalls: int,
    rng: random.Random,
) -> Sample:
    """Text with notes in its first half and recall lines at its end or scattered through its second half."""

    def line(kind: str, key: str, value: str) -> tuple[list[int], list[bool]]:
        start = f"\n# {kind} {key} = "
        ids, spans = encode(tokenizer, f"{start}{value}\n")
        return ids, [stop > len(start) and first < len(start) + len(value) for first, stop in spans]

    numbers = [f"{number:06x}" for number in rng.sample(range(16**6), 2 * notes)]
    pairs = list(zip(numbers[:notes], numbers[notes:]))
    note_lines = [line("note", *pair)[0] for pair in pairs]
    recall_lines = [line("recall", *pair) for pair in rng.sample(pairs, recalls)]
    prefix = [] if bos is None else [bos]
    room = length - len(prefix) - sum(map(len, note_lines)) - sum(len(ids) for ids, _ in recall_lines)
    if room < length // 4:
        raise ValueError(f"--length {length} leaves no text beside {notes} notes and {recalls} recalls.")
    text, breaks = text_tokens(tokenizer, files, room, rng)

    early = [at for at in breaks if at < room // 2]
    late = [at for at in breaks if at >= room // 2]
    if len(early) < notes or len(late) < recalls:
        raise ValueError(f"--text has too few lines for {notes} notes and {recalls} recalls; take fewer.")
    note_at = sorted(rng.sample(early, notes))
    recall_at = [room] * recalls if placement == "end" else sorted(rng.sample(late, recalls))

    tokens, answers, done = prefix, [-1] * len(prefix), 0
    lines = [(ids, [-1] * len(ids)) for ids in note_lines]
    lines += [(ids, [n if hit else -1 for hit in is_value]) for n, (ids, is_value) in enumerate(recall_lines)]
    for at, (ids, marks) in zip([*note_at, *recall_at], lines):
        tokens = tokens + text[done:at] + ids
        answers = answers + [-1] * (at - done) + marks
        done = at
    tokens = tokens + text[done:]
    answers = answers + [-1] * (room - done)
    return Sample(placement, torch.tensor([tokens]), torch.tensor(answers), recalls)


@torch.inference_mode()
def evaluate(model: Any, sample: Sample, chunk: int = 2048) -> tuple[float, int]:
    """Mean loss over all tokens, and the number of exact recalls."""
    kept: list[Tensor] = []
    hook = model.base_model.register_forward_hook(lambda *call: kept.append(call[-1][0]))
    # A whole sequence's logits over a large vocabulary are many GB: the model computes its last ones only, and the
    # head is applied to the rest in chunks.
    last = model(sample.tokens, use_cache=False, logits_to_keep=1).logits[0, 0].float()
    hook.remove()
    hidden, targets = kept[0][0, :-1], sample.tokens[0, 1:]
    head = model.get_output_embeddings()
    if not torch.allclose(head(kept[0][0, -1:])[0].float(), last, atol=1e-2, rtol=1e-2):
        raise NotImplementedError(f"{type(model).__name__} changes its logits behind the output head.")
    total, right = 0.0, []
    for part, target in zip(hidden.split(chunk), targets.split(chunk)):
        logits = head(part).float()
        total += cross_entropy(logits, target, reduction="sum").item()
        right.append(logits.argmax(-1) == target)
    answers, correct = sample.recall[1:], torch.cat(right).cpu()
    exact = sum(bool(correct[answers == n].all()) for n in range(sample.recalls))
    return total / len(targets), exact


def measure(
    model: Any, attention: Attention, samples: list[Sample], configs: list[SaleConfig]
) -> Iterator[dict[str, Any]]:
    """A row per sample for dense attention, and then for every config."""
    for number, sample in enumerate(samples):
        dense_loss = 0.0
        for config in [None, *configs]:
            attention.config = config
            attention.stats.clear()
            began = time.perf_counter()
            loss, exact = evaluate(model, sample)
            seconds = time.perf_counter() - began
            if config is None:
                dense_loss = loss
            kept = sum(int(stats.kept_blocks.sum()) for stats in attention.stats)
            visible = sum(int(stats.visible_blocks.sum()) for stats in attention.stats)
            paths = Counter(stats.path for stats in attention.stats) or {"sdpa": model.config.num_hidden_layers}
            yield {
                "sample": number,
                "placement": sample.placement,
                "tokens": sample.tokens.shape[1],
                "threshold": 0.0 if config is None else config.threshold,
                "density": 1.0 if config is None else kept / visible,
                "loss": loss,
                "rise": loss - dense_loss,
                "recall": exact / sample.recalls,
                "exact recall": f"{exact} of {sample.recalls}",
                "path": ", ".join(f"{path} ({count} layers)" for path, count in paths.items()),
                "seconds": round(seconds, 2),
            }


def capture(model: Any, attention: Attention, sample: Sample, layers: tuple[int, ...], length: int) -> None:
    """Fill `attention.captured` with q, k, v (after the rotary embedding) of a dense prefill."""
    attention.config, attention.capture = None, layers
    with torch.inference_mode():
        model.base_model(sample.tokens[:, :length], use_cache=False)
    attention.capture = ()


def save_captured(attention: Attention, path: Path, setting: dict[str, str]) -> None:
    """Write `attention.captured` as ``layerN.query``, ``.key``, ``.value``."""
    tensors = {
        f"layer{layer}.{name}": tensor.contiguous().cpu()
        for layer, captured in attention.captured.items()
        for name, tensor in zip(("query", "key", "value"), captured)
    }
    save_file(tensors, path, setting)
    print(f"{len(tensors)} tensors in {path}")


def check_mask(attention: Attention, config: SaleConfig) -> Iterator[dict[str, Any]]:
    """A row per captured layer: how many blocks the mask and the reference disagree on, and how many are ties."""
    for layer, (query, key, value) in sorted(attention.captured.items()):
        mask, stats = sale_flex.create_sale_block_mask(query, key, config, value=value, stats=True)
        dense = mask.to_dense().bool()
        group = query.shape[1] // key.shape[1]
        visible = kept = differing = ties = 0
        for head in range(query.shape[1]):  # one at a time: the reference takes memory for S x S scores
            of, kv = slice(head, head + 1), slice(head // group, head // group + 1)
            expected = keep_map(query[:, of], key[:, kv], config, value[:, kv], dtype=torch.float64)
            differs = dense[:, of] != expected.kept
            visible += int(expected.visible.sum())
            kept += int(dense[:, of].sum())
            differing += int(differs.sum())
            ties += int((differs & (expected.margin.abs() <= CHECK_MARGIN)).sum())
        yield {
            "layer": layer,
            "tokens": query.shape[2],
            "threshold": config.threshold,
            "density": kept / visible,
            "visible": visible,
            "differing": differing,
            "ties": ties,
            "path": stats.path,
        }


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
    add("--thresholds", default="0.004,0.016,0.032", help="relative attention scores, comma-separated")
    add("--bits", type=int, default=SaleConfig.bits, help="width of the codes")
    add("--block-size", default="64,64", help="query rows and keys of a block")
    add("--sink-tokens", type=int, default=SaleConfig.sink_tokens, help="first keys that are always kept")
    add("--local-tokens", type=int, default=SaleConfig.local_tokens, help="last keys that are always kept")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on a CPU, else bfloat16")
    add("--json", type=Path, metavar="PATH", help="write the rows there")
    add("--capture", type=Path, metavar="FILE", help="store q, k, v of --layers as safetensors, and stop")
    add("--check-mask", action="store_true", help="compare masks with the reference at 8K tokens, and stop")
    add("--layers", help="layers of --capture and --check-mask, comma-separated; default: all")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run one measurement; 1 if `--check-mask` finds a difference that is no tie."""
    args = parse(arguments)
    device = torch.device(args.device)
    dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    attention = Attention()
    register(attention)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, dtype), attn_implementation=NAME)
    model = model.to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    bos = model.config.bos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    files, rng = text_files(args.text), random.Random(args.seed)
    placements = ("end", "scattered") if args.placement == "both" else (args.placement,)
    samples = []
    for placement in placements * args.sequences:
        sample = make_sample(tokenizer, bos, files, args.length, placement, args.notes, args.recalls, rng)
        samples.append(replace(sample, tokens=sample.tokens.to(device)))
    block_q, block_k = map(int, args.block_size.split(","))
    common = SaleConfig(
        block_size=(block_q, block_k),
        bits=args.bits,
        sink_tokens=args.sink_tokens,
        local_tokens=args.local_tokens,
    )
    configs = [replace(common, threshold=float(threshold)) for threshold in args.thresholds.split(",")]
    setting = {"model": args.model, "dtype": dtype, "seed": args.seed}
    setting |= {name: value for name, value in asdict(common).items() if name != "threshold"}

    if args.capture or args.check_mask:
        every = range(model.config.num_hidden_layers)
        layers = every if args.layers is None else map(int, args.layers.split(","))
        length = args.length if args.capture else CHECK_LENGTH
        capture(model, attention, samples[0], tuple(layers), length)
    if args.capture:
        save_captured(attention, args.capture, {"model": args.model, "seed": str(args.seed)})
        return 0
    if args.check_mask:
        columns = CHECK_COLUMNS
        measured = (row for config in configs for row in check_mask(attention, config))
    else:
        columns = QUALITY_COLUMNS
        measured = measure(model, attention, samples, configs)

    origin = provenance(device)
    rows = []
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for row in measured:
        rows.append(row | setting | origin)
        print(f"| {' | '.join(format(row[name], form) for name, form in columns.items())} |", flush=True)
    print(", ".join(f"{name} {origin[name]}" for name in ("device", "torch", "triton", "transformers", "commit")))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(row.get("differing", 0) > row.get("ties", 0) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
