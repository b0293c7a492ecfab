# SPDX-License-Identifier: BSD-3-Clause
"""The half of `measure_quality.py` that runs a model: sequences, loss and recall, calibration, needles, masks.

What is measured of attention alone takes the queries, keys and values of a dense prefill (`Captured`, by layer).
"""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

import sale_flex
from sale_flex import AuxRequest, SaleConfig, SaleStats
from sale_flex.bench.captured import Captured
from sale_flex.bench.model import read_text
from sale_flex.blocks.geometry import always_blocks
from sale_flex.call.facts import make_bounds
from sale_flex.kernels.arguments import Grid
from sale_flex.reference import keep_map
from sale_flex.testing import block_map, mass_error_bound

NAME = "sale_flex_measured"
NEEDLE_SHARE = 0.6
"""A row is a needle row if one far key alone takes this share of its softmax."""
CHECK_MARGIN = 1e-5
"""Largest distance from the relative rule's limit, in logits, at which a block counts as a tie."""
LAST_TAU = 1e-4
"""A calibrated threshold as low as this makes a head dense; the paper's."""


@dataclass(frozen=True)
class Sample:
    """A sequence and its answers."""

    placement: str
    tokens: Tensor
    """int64 ``[1, S]``."""
    recall: Tensor
    """int64 ``[S]``: which recall line's value a token belongs to, -1 for none."""
    recalls: int
    files: tuple[Path, ...]
    """What its text was taken from."""

    @property
    def digest(self) -> str:
        """What tells the sequence from others."""
        return hashlib.sha256(self.tokens.cpu().numpy().tobytes()).hexdigest()[:12]


@dataclass
class Attention:
    """The attention function of every layer: dense by SDPA without configs, SALE with one for every layer."""

    configs: Sequence[SaleConfig] | None = None
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
        if self.configs is None:
            output = dense_attention(Captured(query, key, value, scaling))
        else:
            config = self.configs[module.layer_idx]
            wanted = AuxRequest(stats=True)
            output, aux = sale_flex.sale_attention(query, key, value, config, scale=scaling, return_aux=wanted)
            self.stats += [aux.stats]
        return output.transpose(1, 2).contiguous(), None


def register(attention: Attention) -> None:
    """Make `attention` known to transformers as ``attn_implementation=NAME``."""
    AttentionInterface.register(NAME, attention)
    # One sequence and no padding: plain causal, which needs no mask. Without a function for masks transformers would
    # pass None as well, but then for padded batches too.
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


def dense_attention(captured: Captured) -> Tensor:
    """Causal attention over all keys, ``[1, Hq, S, D]``."""
    query, key, value, scale = captured
    return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)


def encode(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of `text` and the span of characters of each."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoded.input_ids, encoded.offset_mapping


def text_tokens(
    tokenizer: Any, files: list[Path], count: int, rng: random.Random
) -> tuple[list[int], list[int], tuple[Path, ...]]:
    """`count` tokens of consecutive files from a random one on, where lines may be put in (line breaks), and the files.

    Raises:
        ValueError: There is not enough text.
    """
    tokens: list[int] = []
    breaks: list[int] = []
    first = rng.randrange(len(files)) if files else 0
    order = files[first:] + files[:first]
    for number, file in enumerate(order, 1):
        text = read_text(file)
        ids, spans = encode(tokenizer, text)
        breaks += [len(tokens) + i for i, (start, _) in enumerate(spans) if text[start : start + 1] == "\n"]
        tokens += ids
        if len(tokens) >= count:
            return tokens[:count], [at for at in breaks if at < count], tuple(order[:number])
    raise ValueError(f"--text has only {len(tokens)} tokens left for a sequence that takes {count} of them; add text.")


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
        raise ValueError(f"{length} tokens leave no text beside {notes} notes and {recalls} recalls; take fewer.")
    text, breaks, used = text_tokens(tokenizer, files, room, rng)

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
    return Sample(placement, torch.tensor([tokens]), torch.tensor(answers), recalls, used)


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


@torch.inference_mode()
def calibrate(
    samples: Sequence[Mapping[int, Captured]], config: SaleConfig, start: float, allowed: float, relative: bool
) -> dict[int, list[float]]:
    """A threshold for every layer and head as the paper has it (arXiv 2505.24179).

    From `start` a head's threshold is halved until ``|o - o_dense|``, summed over the head dimension and averaged
    over tokens, is below what is allowed; one of `LAST_TAU` or less becomes 0, which keeps all. Over the samples it
    only falls.

    Args:
        samples: Layer -> what its attention got, for every calibration sequence.
        config: The rule; its threshold is not used.
        start: The largest threshold; the paper's is 0.008.
        allowed: The error allowed.
        relative: Whether that is a share of ``|o_dense|``, summed and averaged alike (the paper's is absolute).

    Returns:
        Layer -> a threshold for every query head.
    """
    taus: dict[int, Tensor] = {}
    for sample in samples:
        for layer, captured in sample.items():
            query, key, value, scale = captured
            dense = dense_attention(captured).float()
            limit = allowed * dense.abs().sum(-1).mean((0, 2)) if relative else allowed  # [Hq]
            tau = taus.get(layer, torch.full((query.shape[1],), start, device=query.device))
            while bool((tau > 0).any()):
                output = sale_flex.sale_attention(query, key, value, config.with_options(threshold=tau), scale=scale)
                error = (output.float() - dense).abs().sum(-1).mean((0, 2))
                over = ~(error < limit) & (tau > 0)  # negated: NaN is no small error
                if not bool(over.any()):
                    break
                tau = torch.where(over, tau / 2, tau)
                tau = torch.where(tau <= LAST_TAU, 0.0, tau)
            taus[layer] = tau
    return {layer: tau.tolist() for layer, tau in taus.items()}


@torch.inference_mode()
def find_needles(captured: Captured, config: SaleConfig, chunk: int = 1024) -> Tensor:
    """Rows of which one far key takes `NEEDLE_SHARE` or more: int64 ``[N, 3]`` of (query head, row, key).

    Far is what the rule decides about: visible keys in blocks that are not kept in any case. The softmax is exact, over
    all visible keys and of the rows themselves, whatever the rule pools; only `chunk` rows of one head are held.
    """
    query, key, _, scale = captured
    length, group = query.shape[2], query.shape[1] // key.shape[1]
    block_q, block_k = config.block_size
    grid = Grid(length, length, block_q, block_k)
    bounds = make_bounds(query, key, None, None)
    always = always_blocks(bounds, grid, config.sink_tokens, config.local_tokens, config.min_length)[0]  # [nq, nk]
    at = torch.arange(length, device=query.device)
    found = []
    for head in range(query.shape[1]):
        keys = key[0, head // group].float()
        for rows in at.split(chunk):
            logits = scale * (query[0, head, rows].float() @ keys.T)
            logits.masked_fill_(at > rows[:, None], -torch.inf)
            total = logits.logsumexp(-1)
            near = always[rows // block_q].repeat_interleave(block_k, -1)[:, :length]
            largest, where = logits.masked_fill_(near, -torch.inf).max(-1)
            needle = (largest - total).exp() >= NEEDLE_SHARE
            found.append(torch.stack([torch.full_like(rows, head), rows, where], 1)[needle])
    return torch.cat(found)


@torch.inference_mode()
def kept_needles(captured: Captured, config: SaleConfig, needles: Tensor) -> tuple[Tensor, SaleStats]:
    """Which of `needles` lie in a block that `config` keeps, bool ``[N]``, and what it keeps in all."""
    query, key, value, scale = captured
    mask, stats = sale_flex.create_sale_block_mask(query, key, config, value=value, scale=scale, stats=True)
    head, row, column = needles.unbind(1)
    block_q, block_k = config.block_size
    return block_map(mask).kept[0, head, row // block_q, column // block_k], stats


def check_mask(captured: Captured, config: SaleConfig) -> dict[str, Any]:
    """On how many blocks of one layer the mask and the reference disagree, and how many of these are ties."""
    query, key, value, scale = captured
    mask, stats = sale_flex.create_sale_block_mask(query, key, config, value=value, scale=scale, stats=True)
    dense = block_map(mask).kept
    group = query.shape[1] // key.shape[1]
    visible = kept = differing = ties = 0
    for head in range(query.shape[1]):  # one at a time: the reference takes memory for S x S scores
        of, kv = slice(head, head + 1), slice(head // group, head // group + 1)
        q, k = query[:, of], key[:, kv]
        expected = keep_map(q, k, config, value[:, kv], scale=scale, dtype=torch.float64)
        differs = dense[:, of] != expected.kept
        within = CHECK_MARGIN if config.rule.name == "relative" else mass_error_bound(q, k, scale)
        visible += int(expected.visible.sum())
        kept += int(dense[:, of].sum())
        differing += int(differs.sum())
        ties += int((differs & (expected.margin.abs() <= within)).sum())
    return {
        "tokens": query.shape[2],
        "density": kept / visible,
        "visible": visible,
        "differing": differing,
        "ties": ties,
        "path": stats.describe(),
    }
