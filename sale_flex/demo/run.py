# SPDX-License-Identifier: BSD-3-Clause
"""Prefill one prompt densely and with SALE, and report what differs."""

import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import sale_flex
from sale_flex import Mass, SaleConfig
from sale_flex._console.stored import stored_config
from sale_flex.demo.model import SwitchedAttention, load
from sale_flex.demo.prompt import Prompt, Score, build_prompt, held_out_texts, score

NOTES = 40
MIN_LENGTH = 1024
"""Tokens up to which a query keeps everything: less than the break-even, so that the sparse path is what is shown."""
_ENOUGH_SECONDS = 5.0
"""A prefill is timed up to three times, but not again after so long: a CPU needs many seconds."""
MIN_DENSE_RECALL, MAX_RECALL_DROP, MAX_DENSITY = 0.95, 0.05, 0.6


@dataclass(frozen=True)
class Report:
    """What the demo measured; seconds are a prefill's median, warm-up and compilation excluded."""

    density: float
    """Kept over visible blocks of all layers and heads."""
    dense_loss: float
    sale_loss: float
    """Mean cross entropy of the prompt's tokens in nats."""
    dense_recall: float
    sale_recall: float
    """Share of the recall lines whose value is predicted exactly."""
    dense_seconds: float
    sale_seconds: float
    tokens: int
    notes: int
    device: str
    device_name: str
    dtype: str
    config: dict[str, Any]
    """The fields of `SaleConfig`."""
    path: str
    """Which path `sale_attention` ran."""
    head_density: list[list[float]]
    """Kept over visible blocks, by layer and head."""
    versions: dict[str, str]

    def problems(self) -> list[str]:
        """Why the demo is not as it should be, a sentence each; empty when it is."""
        problems = []
        if self.dense_recall < MIN_DENSE_RECALL:
            problems.append(
                f"dense recall is {self.dense_recall:.3f}, below {MIN_DENSE_RECALL}: the model "
                f"cannot do the task on this prompt, so SALE is not to blame"
            )
        # Recall is a multiple of 1 / NOTES, so that half of that is room for rounding only.
        if self.dense_recall - self.sale_recall > MAX_RECALL_DROP + 0.5 / self.notes:
            problems.append(
                f"SALE's recall is {self.sale_recall:.3f}, more than {MAX_RECALL_DROP} below "
                f"dense ({self.dense_recall:.3f}); lower --threshold"
            )
        if self.density > MAX_DENSITY:
            problems.append(
                f"density is {self.density:.3f}, above {MAX_DENSITY}: SALE kept too many blocks; "
                f"raise --threshold or --tokens"
            )
        return problems

    def to_dict(self) -> dict[str, Any]:
        """All fields, and what follows from them, as JSON takes them."""
        return {
            **asdict(self),
            "loss_rise": self.sale_loss - self.dense_loss,
            "problems": self.problems(),
        }


def run(
    *,
    folder: Path | None = None,
    threshold: float,
    tokens: int,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    want_maps: bool = False,
) -> tuple[Report, list[Tensor]]:
    """Build the prompt, prefill it twice, and compare.

    Args:
        folder: The model's folder; None is the packaged model.
        threshold: SALE's threshold.
        tokens: Length of the prompt.
        seed: Chooses the prompt.
        device: Default: CUDA if there is a device.
        dtype: Name of a torch dtype; default: bfloat16 on CUDA, float32 elsewhere.
        want_maps: Also return the kept blocks.

    Returns:
        The report, and bool `[Hq, nq, nk]` for every layer (an empty list without `want_maps`).
    """
    where = _device(device)
    dtype = dtype or ("bfloat16" if where.type == "cuda" else "float32")
    model, tokenizer, attention = load(folder, where, getattr(torch, dtype))
    longest = model.config.max_position_embeddings
    if not 2 <= tokens <= longest:
        raise ValueError(f"tokens must be in [2, {longest}], what the model can read, got {tokens}; lower it")
    prompt = build_prompt(tokenizer, held_out_texts(), tokens=tokens, notes=NOTES, seed=seed)
    config = SaleConfig(rule=Mass(threshold), min_length=MIN_LENGTH)

    dense, dense_seconds = _prefill(model, attention, prompt, None)
    attention.maps = [] if want_maps else None
    sale, sale_seconds = _prefill(model, attention, prompt, config)
    kept = torch.stack([stats.kept_blocks[0] for stats in attention.stats]).cpu()  # [L, Hq]
    visible = torch.stack([stats.visible_blocks[0] for stats in attention.stats]).cpu()
    report = Report(
        density=(kept.sum() / visible.sum()).item(),
        dense_loss=dense.loss,
        sale_loss=sale.loss,
        dense_recall=dense.recall,
        sale_recall=sale.recall,
        dense_seconds=dense_seconds,
        sale_seconds=sale_seconds,
        tokens=len(prompt.tokens),
        notes=NOTES,
        device=str(where),
        device_name=_device_name(where),
        dtype=dtype,
        config=stored_config(config, threshold=True),
        path=", ".join(sorted({stats.describe() for stats in attention.stats})),
        head_density=(kept / visible).tolist(),
        versions={
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "sale_flex": sale_flex.__version__,
        },
    )
    return report, attention.maps or []


@torch.no_grad()
def _prefill(
    model: PreTrainedModel, attention: SwitchedAttention, prompt: Prompt, config: SaleConfig | None
) -> tuple[Score, float]:
    """Score a prompt and time its prefill after a first run, which compiles and records maps."""
    ids = torch.tensor([prompt.tokens], device=model.device)
    attention.config = config
    logits = model(input_ids=ids, use_cache=False).logits[0]
    result = score(logits, prompt)
    maps, attention.maps = attention.maps, None
    seconds: list[float] = []
    while len(seconds) < 3 and sum(seconds) < _ENOUGH_SECONDS:
        attention.stats = []
        start = _now(ids.device)
        model(input_ids=ids, use_cache=False)
        seconds.append(_now(ids.device) - start)
    attention.maps = maps
    return result, median(seconds)


def _device(name: str | None) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if name is None:
        return torch.device("cuda" if has_cuda else "cpu")
    if name != "cpu" and not (has_cuda and name.partition(":")[0] == "cuda"):
        raise ValueError(
            f"device must be cpu{', cuda or cuda:N' if has_cuda else ', as torch finds no CUDA'}, got {name!r}"
        )
    return torch.device(name)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
