# SPDX-License-Identifier: BSD-3-Clause
"""What rules that choose blocks cost a model: loss, density and the audit's reading, text by text.

Every text is one sequence: its first tokens. The model runs dense once and then under every rule, and a row holds the
mean loss over all tokens, its rise over the dense one, the density over the layers that choose, and what the audit read
of every head. ``exact`` is no rule of the library: masses of every query_stride-th query from exact logits, the best
that any estimate of these rows could do.

    python examples/measure_trust.py MODEL --texts a.txt b.txt --length 8192 --json trust.json
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from quality_rules import Rows, Rule, parse_rules, table
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from sale_flex import SaleConfig, flex_kernel_options, sale_attention
from sale_flex._console.provenance import provenance
from sale_flex.blocks.bits import pack_bits
from sale_flex.blocks.geometry import always_blocks, full_blocks, visible_blocks
from sale_flex.call.audit import audit
from sale_flex.call.facts import check_arguments, settle
from sale_flex.call.user_mods import UserMods
from sale_flex.integrations import transformers as sale_hf
from sale_flex.integrations.transformers.calls import AttentionCall, observe
from sale_flex.kernels.arguments import Grid

RULES = (
    "scan:0.01:0.02:0.03:0.04,moments:0.0025:0.005:0.01:0.02,relative:0.001:0.004:0.016:0.064,exact:0.01:0.02:0.03:0.06"
)
"""The default, the fast option, the rule as published, and exact masses of the default's rows."""

COLUMNS = ("tokens", "rule", "mean rise", "largest", "density", "miss")


class Reading(NamedTuple):
    """What layers that chose blocks did: a list per layer, a value per head."""

    density: list[list[float]]
    wanted: list[list[float]]
    """Sum over audited rows of the probability on blocks that they want."""
    missed: list[list[float]]
    """Sum of the squares of what they missed of it."""


class Exact:
    """Stands in for attention of a configured model: chooses blocks by exact masses, and reads the audit itself."""

    def __init__(self, config: SaleConfig) -> None:
        self.config, self.reading = config, Reading([], [], [])
        self.attend = torch.compile(flex_attention, dynamic=True)
        self.options = partial(flex_kernel_options, block_size=config.block_size)

    def __call__(self, call: AttentionCall) -> Tensor:
        """Attention of one layer; under a mask, a window for instance, as the config computes it."""
        query, key, value, options = call.query, call.key, call.value, dict(call.options)
        scale = options.pop("scale", query.shape[3] ** -0.5)
        if any(given is not None for given in options.values()):
            return sale_attention(query, key, value, self.config, scale=scale, **options)
        kept, bounds, grid = self.choose(query, key, scale)
        given = check_arguments(query, key, value, self.config, UserMods(), None, None, scale, None)
        _, seen = audit(settle(given), pack_bits(kept), None, None)
        visible = visible_blocks(bounds, grid)[:, None]
        self.reading.density.append((kept.sum((2, 3)) / visible.sum((2, 3)))[0].tolist())
        self.reading.wanted.append(seen.wanted_mass[0].tolist())
        self.reading.missed.append(seen.missed_squares[0].tolist())
        full = full_blocks(bounds, grid)[:, None]
        lists = [x for part in (kept & ~full, kept & full) for x in _lists(part)]
        block_mask = BlockMask.from_kv_blocks(
            *lists,
            BLOCK_SIZE=self.config.block_size,
            mask_mod=lambda b, h, q_idx, kv_idx: kv_idx <= q_idx,
            seq_lengths=(query.shape[2], key.shape[2]),
            compute_q_blocks=False,
        )
        return self.attend(
            query, key, value, block_mask=block_mask, scale=scale, enable_gqa=True, kernel_options=self.options(query)
        )

    def choose(self, query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor, Grid]:
        """Kept blocks, bool ``[1, Hq, nq, nk]``, bounds, and the grid of blocks."""
        config, stride = self.config, self.config.rule.pool
        heads, length = query.shape[1:3]
        grid = Grid(length, length, *config.block_size)
        bounds = torch.tensor([[0, 0, length]], dtype=torch.int32, device=query.device)
        always = always_blocks(bounds, grid, config.sink_tokens, config.local_tokens, config.min_length or 0)
        hits = torch.zeros(1, heads, grid.query_blocks, grid.key_blocks, dtype=torch.bool, device=query.device)
        at = torch.arange(length, device=query.device)
        rows_per_block = config.block_size[0] // stride
        for head in range(heads):
            of_key = key[0, head * key.shape[1] // heads].float()
            for rows in at[stride - 1 :: stride].split(32 * rows_per_block):
                logits = (query[0, head, rows].float() @ of_key.T) * scale
                shares = logits.masked_fill_(at > rows[:, None], -torch.inf).softmax(-1)
                masses = shares.unflatten(-1, (-1, config.block_size[1])).sum(-1).unflatten(0, (-1, rows_per_block))
                first = int(rows[0]) // config.block_size[0]
                hits[0, head, first : first + len(masses)] = masses.amax(1) >= config.rule.threshold
        return (hits | always[:, None]) & visible_blocks(bounds, grid)[:, None], bounds, grid


def _lists(kept: Tensor) -> tuple[Tensor, Tensor]:
    return kept.sum(-1).int(), kept.int().argsort(dim=-1, descending=True, stable=True).int()


@torch.inference_mode()
def token_losses(model: Any, tokens: Tensor, chunk: int = 2048) -> Tensor:
    """Loss of every token but the first, float32; the vocabulary's logits are never there for all of them."""
    hidden = model.base_model(tokens, use_cache=False).last_hidden_state[0, :-1]
    head, targets = model.get_output_embeddings(), tokens[0, 1:]
    parts = zip(hidden.split(chunk), targets.split(chunk))
    return torch.cat([cross_entropy(head(part).float(), target, reduction="none") for part, target in parts])


def read(model: Any) -> Reading:
    """What the model's layers did, as far as they chose."""
    layers = [one for one in sale_hf.stats(model).layers if one.audited_rows]
    wanted = [[mass * one.audited_rows for mass in one.wanted_mass] for one in layers]
    squares = [[miss * (w + 1) for miss, w in zip(one.miss, of_layer)] for one, of_layer in zip(layers, wanted)]
    return Reading([list(one.density) for one in layers], wanted, squares)


class Session:
    """A model, its texts, and what was measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        device = torch.device(args.device)
        files = {} if args.gguf is None else {"gguf_file": args.gguf}
        sale_hf.register()
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.model = AutoModelForCausalLM.from_pretrained(
            args.model, dtype=dtype, attn_implementation="sale_flex", **files
        )
        self.model = self.model.to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(args.model, **files)
        first = 0 if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        self.texts: dict[str, Tensor] = {}
        for text in args.texts:
            words = text.read_text(encoding="utf-8")
            if text.suffix == ".json":
                ids = json.loads(words)
            else:
                ids = [first, *tokenizer(words, add_special_tokens=False).input_ids]
            if len(ids) < max(args.length):
                raise ValueError(f"{text} has {len(ids)} tokens, --length is {max(args.length)}; take a longer text.")
            self.texts[text.stem] = torch.tensor([ids], device=device)
        self.rows = Rows(args.json, args.fresh, provenance(device))
        self.identity = {"kind": "trust", "model": args.name or str(args.model), "min_length": args.min_length}
        self.dense: dict[tuple[str, int], Tensor] = {}

    def dense_losses(self, name: str, length: int) -> Tensor:
        """Token losses of the dense model, computed once a sequence."""
        if (name, length) not in self.dense:
            sale_hf.configure(self.model, SaleConfig(min_length=2**30))
            self.dense[name, length] = token_losses(self.model, self.texts[name][:, :length])
        return self.dense[name, length]

    def measure(self, rule: Rule, exact: bool, name: str, length: int) -> dict[str, Any]:
        """One rule on one sequence."""
        with self.running(rule.config, exact) as read_it:
            losses = token_losses(self.model, self.texts[name][:, :length])
            reading = read_it()
        heads = [value for layer in reading.density for value in layer]
        return {
            "loss": round(losses.mean().item(), 5),
            "rise": round((losses - self.dense_losses(name, length)).mean().item(), 5),
            "density": round(sum(heads) / len(heads), 4),
            **{
                field: [[round(x, 5) for x in layer] for layer in rows]
                for field, rows in zip(("wanted", "missed"), reading[1:])
            },
        }

    @contextmanager
    def running(self, config: SaleConfig, exact: bool) -> Iterator[Callable[[], Reading]]:
        """The model under a rule, and how to read what it did."""
        sale_hf.configure(self.model, config)
        if not exact:
            yield partial(read, self.model)
            return
        stand_in = Exact(config)
        with observe(self.model, stand_in):
            yield lambda: stand_in.reading

    def run(self, rules: list[tuple[Rule, str]], length: int) -> list[list[str]]:
        """Measure what is missing, rule by rule; rows of a table."""
        shown = []
        for rule, label in rules:
            found = []
            for name in self.texts:
                identity = self.identity | {"tokens": length, "sequence": name, "rule": label}
                measure = partial(self.measure, rule, label.startswith("exact"), name, length)
                found.append(self.rows.once(identity, measure))
            rises = [row["rise"] for row in found]
            density = sum(row["density"] for row in found) / len(found)
            means = (
                f"{sum(rises) / len(rises):+.4f}",
                f"{max(rises):+.4f}",
                f"{density:.3f}",
                f"{worst_miss(found):.3f}",
            )
            shown.append([str(length), label, *means])
        return shown


def worst_miss(rows: list[dict[str, Any]]) -> float:
    """The audit's reading of the worst head, each head over all sequences."""
    missed, wanted = (torch.tensor([row[field] for row in rows]).sum(0) for field in ("missed", "wanted"))
    return float((missed / (wanted + 1)).max())


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("model", help="folder or name of a model")
    add("--texts", type=Path, nargs="+", required=True, help="files, each one sequence: text, or token ids as JSON")
    add("--length", type=int, nargs="+", default=[8192], help="tokens of a sequence, multiples of 128")
    add("--rules", default=RULES, help="NAME[/OPTION=VALUE...]:THRESHOLD..., as in measure_quality.py, and exact")
    add("--min-length", type=int, default=1024)
    add("--gguf", help="file of the folder that holds the weights, if it is a GGUF file")
    add("--name", help="what rows call the model")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", type=Path, help="rows; what is there already is not measured again")
    add("--fresh", action="store_true", help="measure everything again")
    args = parser.parse_args(arguments)
    for length in args.length:
        if length % 128 or length <= args.min_length:
            parser.error(f"--length must be a multiple of 128 above --min-length, got {length}")
    common = SaleConfig(min_length=args.min_length)
    try:
        args.parsed = []
        for item in args.rules.split(","):
            exact = item.strip().startswith("exact")
            for rule in parse_rules(item.strip().replace("exact", "scan", 1) if exact else item, common):
                label = rule.label.replace("scan", "exact", 1) if exact else rule.label
                args.parsed.append((rule, label))
    except ValueError as error:
        parser.error(f"--rules: {error}")
    if any(rule.calibrated for rule, _ in args.parsed):
        parser.error("--rules: calibrated rules are measured by measure_quality.py")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Run it."""
    args = parse(arguments)
    try:
        session = Session(args)
        rows = [row for length in args.length for row in session.run(args.parsed, length)]
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(COLUMNS, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
