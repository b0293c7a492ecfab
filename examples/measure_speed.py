# SPDX-License-Identifier: BSD-3-Clause
"""Time of SALE, stage by stage, beside dense attention on one GPU.

By default the attention of Llama-3.1-8B (32 query heads, 8 KV heads, 128 channels, bf16, causal, batch 1) at 64K and
128K tokens. All candidates run in one process, one after the other in every round; the medians are shown. Nothing is
timed before the sparse output has been compared with a float32 reference.

    python examples/measure_speed.py --json speed.json

The inputs are synthetic (`structured_inputs`), and the threshold is searched that gives the density asked for: these
are times at a density. What a density costs in quality on a trained model is what `measure_quality.py` measures.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import normalize, scaled_dot_product_attention

import sale_flex
from sale_flex import SaleConfig, ops
from sale_flex.block_mask import build_block_mask
from sale_flex.flex import run_flex

BASELINES = {
    "cudnn": "dense cuDNN SDPA",
    "fa2": "dense FlashAttention-2 SDPA",
    "flex": "dense flex_attention",
}
"""What times are divided by, and its name in the table."""


def structured_inputs(
    length: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[1, H, length, dim]`` whose attention map looks like a trained one's.

    Independent random vectors leave nothing to drop: every block holds an element about as large as any other. Here a
    logit is a sum of what trained heads show, the channels being shared out and then mixed by a rotation:

    * a sink: 8 on key 0, from every row;
    * a local decay: 5 at distance 0, a sum of cosines of 16 wavelengths from 6 to 6,000 tokens;
    * clusters: 6, times 0.6 to 1.4 from the first head of a group to the last, where the key's stretch of text (1,024
      tokens on average) has one of 32 topics and the row's stretch has the same one;
    * needles: 10 on a single earlier key, from one row in 64; other rows have noise there.
    """
    generator = torch.Generator(device).manual_seed(seed)
    rand = partial(torch.rand, generator=generator, device=device)
    randn = partial(torch.randn, generator=generator, device=device)
    waves, group = 16, heads // kv_heads
    topic_dim = (dim - 1 - 2 * waves) // 2
    at = torch.arange(length, device=device)
    frequency = torch.logspace(0, -3, waves, device=device)
    wave = torch.cat([fn(at[:, None] * frequency) for fn in (torch.cos, torch.sin)], 1) / math.sqrt(waves)
    query = torch.empty(1, heads, length, dim, dtype=dtype, device=device)
    key = torch.empty(1, kv_heads, length, dim, dtype=dtype, device=device)
    for kv in range(kv_heads):
        rotation = torch.linalg.qr(randn(dim, dim))[0]
        stretch = (rand(length) < 1 / 1024).cumsum(0)
        topic = normalize(randn(32, topic_dim), dim=1)[(rand(length) * 32).long()[stretch]]
        identity = normalize(randn(length, dim - 1 - 2 * waves - topic_dim), dim=1)
        key[0, kv] = torch.cat([(at == 0).float()[:, None], wave, topic, identity], 1) @ rotation
        for member in range(group):
            strength = 6 * (0.6 + 0.8 * member / max(group - 1, 1))
            needle = identity[(rand(length) * (at + 1)).long()]
            seeks = rand(length, 1) < 1 / 64
            wanted = torch.where(seeks, 10 * needle, normalize(randn(identity.shape), dim=1) * 4)
            parts = [torch.full((length, 1), 8.0, device=device), 5 * wave, strength * topic, wanted]
            query[0, kv * group + member] = torch.cat(parts, 1) @ rotation * math.sqrt(dim)
    return query, key, randn(1, kv_heads, length, dim).to(dtype)


def find_threshold(query: Tensor, key: Tensor, config: SaleConfig, density: float) -> tuple[float, float]:
    """The threshold that keeps about `density` of the visible blocks, and what it keeps; bisection in its logarithm."""
    low, high = math.log(1e-8), math.log(1e4)
    for _ in range(20):
        threshold = math.exp((low + high) / 2)
        stats = sale_flex.create_sale_block_mask(query, key, replace(config, threshold=threshold), stats=True)[1]
        got = (stats.kept_blocks.sum() / stats.visible_blocks.sum()).item()
        low, high = (low, math.log(threshold)) if got < density else (math.log(threshold), high)
    return threshold, got


def causal_block_mask(length: int, device: torch.device, block: int = 128) -> BlockMask:
    """flex_attention's mask of dense causal attention, without the S x S matrix that `create_block_mask` builds."""
    blocks = math.ceil(length / block)
    row = torch.arange(blocks, dtype=torch.int32, device=device)
    diagonal = row[None, None, :, None].expand(1, 1, blocks, blocks).contiguous()
    below = row.expand(1, 1, blocks, blocks).contiguous()
    return BlockMask.from_kv_blocks(
        torch.ones_like(row)[None, None],
        diagonal,
        row[None, None].clone(),
        below,
        BLOCK_SIZE=block,
        mask_mod=lambda b, h, q, kv: q >= kv,
        seq_lengths=(length, length),
        compute_q_blocks=False,
    )


def row_error(output: Tensor, query: Tensor, key: Tensor, value: Tensor, rows: Tensor, mask: BlockMask | None) -> float:
    """Relative error of sampled rows against float32 softmax attention on what `mask` keeps (None: on all)."""
    (_, heads, length, dim), kv_heads = query.shape, key.shape[1]
    wanted = query[:, :, rows].float().reshape(1, kv_heads, -1, dim)
    logits = (wanted @ key.float().transpose(-1, -2) * dim**-0.5).view(1, heads, len(rows), length)
    hidden = torch.arange(length, device=rows.device) > rows[:, None]
    if mask is not None:
        block_q, block_k = mask.BLOCK_SIZE
        kept = mask.to_dense()[:, :, rows // block_q].bool()
        hidden = hidden | ~kept.repeat_interleave(block_k, -1)[..., :length]
    weights = logits.masked_fill_(hidden, -math.inf).softmax(-1)
    expected = (weights.view(1, kv_heads, -1, length) @ value.float()).view(1, heads, len(rows), dim)
    return ((output[:, :, rows].float() - expected).norm() / expected.norm()).item()


def dense_candidates(query: Tensor, key: Tensor, value: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Dense causal attention: what SDPA offers, and flex_attention."""

    def sdpa(backend: SDPBackend | None = None) -> Tensor:
        if backend is not None and not query.is_cuda:
            raise RuntimeError("needs a CUDA device")
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    mask = causal_block_mask(query.shape[2], query.device)
    flex = torch.compile(flex_attention, fullgraph=True)
    return {
        BASELINES["cudnn"]: partial(sdpa, SDPBackend.CUDNN_ATTENTION),
        BASELINES["fa2"]: partial(sdpa, SDPBackend.FLASH_ATTENTION),
        "dense SDPA, torch's choice": sdpa,
        BASELINES["flex"]: lambda: flex(query, key, value, block_mask=mask, enable_gqa=True),
    }


def sale_candidates(
    query: Tensor, key: Tensor, value: Tensor, config: SaleConfig, mask: BlockMask
) -> dict[str, Callable[[], Any]]:
    """The stages of `sale_attention`, each on the results of those before it, the whole, and attention on `mask`."""
    heads, length, dim = query.shape[1:]
    scale = dim**-0.5
    block_q, block_k = config.block_size
    bounds = ops.query_bounds(query, key, None, None, 0)
    threshold = torch.full((heads,), config.threshold, device=query.device)
    lengths = (length, length, block_q, block_k)
    kept_always = (config.sink_tokens, config.local_tokens, config.min_length)

    def quantize() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        mean = ops.key_mean(key, bounds, config.smooth_tokens)
        keys = ops.quantize_groups(key, mean, bounds, block_k, config.bits)
        return mean, *ops.quantize_rows(query, config.bits), *keys

    def limits() -> Tensor:
        return ops.row_limits(query, key, mean, query_scale, bounds, threshold, scale, *kept_always[:2])

    def compact() -> tuple[Tensor, ...]:
        nonfinite = ops.nonfinite_blocks(value, bounds, block_k)
        return ops.build_lists(hits, nonfinite, bounds, key.shape[1], *lengths, *kept_always)

    mean, query_codes, query_scale, key_codes, key_scale = quantize()
    limit = limits()
    scan = partial(ops.scan_max, query_codes, limit, key_codes, key_scale, bounds, *lengths, config.local_tokens, True)
    hits = scan()
    # As in `sale_attention`: compiled, so that the mask_mod need not look up the kept blocks.
    inner = build_block_mask(query, key, value, bounds, True, scale, config, lookup=False).block_mask
    options = sale_flex.flex_kernel_options(query, config.block_size)
    flex = torch.compile(partial(flex_attention, kernel_options=options), fullgraph=True)
    return {
        "quantize": quantize,
        "row limits": limits,
        "scan": scan,
        "compact": compact,
        "block mask (the four above)": partial(sale_flex.create_sale_block_mask, query, key, config, value=value),
        "flex_attention inside sale_attention": partial(run_flex, query, key, value, inner, scale, None),
        "sale_attention": partial(sale_flex.sale_attention, query, key, value, config),
        "flex_attention on the public mask": partial(flex, query, key, value, block_mask=mask, enable_gqa=True),
    }


def milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    """Time of one call, by device events where there are any."""
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e3
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def peak_extra_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Most memory a call holds beyond what was there before and beyond the tensor it returns; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    output = result.nbytes if isinstance(result, Tensor) else 0
    return torch.cuda.max_memory_allocated() - before - output


@torch.inference_mode()
def measure(length: int, density: float, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one length and density: check, then time."""
    device = torch.device(args.device)
    query, key, value = structured_inputs(
        length, args.heads, args.kv_heads, args.dim, getattr(torch, args.dtype), device, args.seed
    )
    config = SaleConfig(block_size=tuple(map(int, args.block_size.split(","))), bits=args.bits)
    threshold, got = find_threshold(query, key, config, density)
    config = replace(config, threshold=threshold)
    mask = sale_flex.create_sale_block_mask(query, key, config, value=value)

    rows = torch.linspace(0, length - 1, 37, device=device).long()
    output = sale_flex.sale_attention(query, key, value, config)
    sparse = row_error(output, query, key, value, rows, mask)
    output = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    dense = row_error(output, query, key, value, rows, None)
    del output
    print(f"\n{length} tokens, density {got:.4f} at threshold {threshold:.3g}", end="; ")
    print(f"error {sparse:.1e}, that of dense SDPA {dense:.1e}")
    # Both compute one softmax in the inputs' precision. Twice the error of torch's own dense kernel is a wrong result.
    if not sparse <= 2 * dense + 1e-6:
        raise SystemExit("The sparse output is wrong: nothing was timed.")

    times: dict[str, list[float]] = {}
    skipped: dict[str, str] = {}
    runs = dense_candidates(query, key, value) | sale_candidates(query, key, value, config, mask)
    for name, run in runs.items():
        try:
            run()
            times[name] = []
        except RuntimeError as error:
            if not name.startswith("dense"):
                raise
            skipped[name] = str(error).partition("\n")[0]
    memory = {name: peak_extra_bytes(runs[name], device) for name in times}
    for _ in range(args.rounds):
        for name, series in times.items():
            series.append(milliseconds(runs[name], device))

    median = {name: statistics.median(series) for name, series in times.items()}
    baselines = {short: median.get(name) for short, name in BASELINES.items()}
    return [
        {
            "length": length,
            "name": name,
            "ms": median.get(name),
            "ms_all": times.get(name),
            "skipped": skipped.get(name),
            "extra_bytes": memory.get(name),
            "extra_over_query": memory[name] / query.nbytes if memory.get(name) is not None else None,
            **{
                f"over_{short}": median[name] / base if base and name in median else None
                for short, base in baselines.items()
            },
            "density": got,
            "threshold": threshold,
            "error": sparse,
            "dense_error": dense,
        }
        for name in runs
    ]


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows of one length and density."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    print("| | ms | / cuDNN | / FA2 | / dense flex | extra memory / q |\n| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        ratios = [number(row[f"over_{short}"], ".3f") for short in BASELINES]
        time_ = f"not run: {row['skipped']}" if row["skipped"] else f"{row['ms']:.2f}"
        print(f"| {row['name']} | {time_} | {' | '.join(ratios)} | {number(row['extra_over_query'], '.2f')} |")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--lengths", default="65536,131072", help="tokens, comma-separated")
    add("--densities", default="0.1", help="shares of the visible blocks to keep, comma-separated")
    add("--heads", type=int, default=32)
    add("--kv-heads", type=int, default=8)
    add("--dim", type=int, default=128, help="channels of a head, at least 40")
    add("--block-size", default="64,64", help="query rows and keys of a block")
    add("--bits", type=int, default=SaleConfig.bits, help="width of the codes")
    add("--rounds", type=int, default=10, help="how often everything is timed")
    add("--keep-compiled", action="store_true", help="time later lengths with dynamic shapes, as in use")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if cuda else "cpu")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16" if cuda else "float32")
    add("--json", type=Path, metavar="PATH", help="write the rows there")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure every length and density."""
    args = parse(arguments)
    origin = provenance(torch.device(args.device))
    setting = {
        name: getattr(args, name) for name in ("heads", "kv_heads", "dim", "dtype", "block_size", "bits", "seed")
    }
    rows = []
    for length in map(int, args.lengths.split(",")):
        # A second length makes the compiler switch to dynamic lengths, which run a little slower.
        if not args.keep_compiled:
            torch.compiler.reset()
        for density in map(float, args.densities.split(",")):
            measured = measure(length, density, args)
            show(measured)
            rows += [row | setting | origin for row in measured]
    print("\n" + ", ".join(f"{name} {origin[name]}" for name in ("device", "torch", "triton", "commit")))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
