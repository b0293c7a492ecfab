# SPDX-License-Identifier: BSD-3-Clause
"""What every ready mod costs the estimate, and whether moments may stand for the keys under it.

Times the mask stage under each mod against that of causal attention without mods, interleaved in one process, and
compares which blocks `moments` and `scan` choose under every score mod. Needs a CUDA device for times that mean
something.

    python examples/measure_mods.py --length 131072 --heads 32 --kv-heads 8 --json mods.json
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from sale_flex import Mass, SaleConfig, create_sale_block_mask, mods
from sale_flex._console.provenance import provenance
from sale_flex.bench.generator import generate
from sale_flex.bench.timing import interleave
from sale_flex.call.facts import check_arguments, settle
from sale_flex.call.stages import choose, lay_out
from sale_flex.call.user_mods import UserMods
from sale_flex.testing import block_map

Options = dict[str, Any]


def programs(length: int, heads: int, device: str) -> dict[str, Options]:
    """The ready mods at usual sizes."""
    documents = torch.arange(length, device=device) // max(length // 16, 1)
    table = torch.randn(heads, 512, generator=torch.Generator().manual_seed(0)).to(device)
    side = int(length**0.5)
    cube = round(length ** (1 / 3))
    found: dict[str, Options] = {
        "causal (as a mask)": {"mask_mod": mods.causal(), "is_causal": False},
        "window 4096": {"mask_mod": mods.sliding_window(4096)},
        "16 documents": {"mask_mod": mods.document(documents)},
        "prefix of 4096": {"mask_mod": mods.prefix_lm(4096), "is_causal": False},
        "alibi": {"score_mod": mods.alibi(heads, device=device)},
        "soft cap 50": {"score_mod": mods.softcap(50.0)},
        "relative bias": {"score_mod": mods.relative_bias(table)},
        "relative bias, rough": {"score_mod": mods.relative_bias(table, rough=True)},
        "neighborhood 1-d": {"mask_mod": mods.neighborhood((length,), min(4095, length // 2)), "is_causal": False},
    }
    if side * side == length:
        found["neighborhood 2-d"] = {
            "mask_mod": mods.neighborhood((side, side), min(63, side // 2)),
            "is_causal": False,
        }
    if cube**3 == length:
        neighborhood = mods.neighborhood((cube, cube, cube), min(15, cube // 2))
        found["neighborhood 3-d"] = {"mask_mod": neighborhood, "is_causal": False}
    return found


class Timed:
    """The mask stage of one program in parts."""

    def __init__(self, query: Tensor, key: Tensor, config: SaleConfig, options: Options) -> None:
        self.call = settle(check_arguments(query, key, None, config, UserMods(**options), None, None, None, None))

    def structure(self) -> Any:
        """Which blocks the mods show, and the lists of candidates; nothing without mods."""
        return lay_out(self.call)

    def estimate(self, structure: Any) -> Callable[[], Any]:
        """Codes and the estimate, without what `structure` costs."""
        return lambda: choose(self.call, structure)


def time_programs(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Milliseconds of every program's stages, and their ratio to those of causal attention without mods."""
    query, key, *_ = generate(args.length, args.heads, args.kv_heads, args.head_dim, dtype=dtype, device=device)
    config = SaleConfig(Mass.fast(args.threshold), min_length=0)
    rows = []
    for name, options in programs(args.length, args.heads, str(device)).items():
        mine = Timed(query, key, config, options)
        plain_config = config.with_options(sub_block=1) if mine.call.masked.needs_scan else config
        plain = Timed(query, key, plain_config, {})
        structure = mine.structure()
        runs = {
            "structure": mine.structure,
            "estimate": mine.estimate(structure),
            "mask": lambda options=options: create_sale_block_mask(query, key, config, **options),
            "plain estimate": plain.estimate(None),
            "plain mask": lambda config=plain_config: create_sale_block_mask(query, key, config),
        }
        times = {part: median(x) for part, x in interleave(runs, args.rounds, device).items()}
        _, stats = create_sale_block_mask(query, key, config, stats=True, **options)
        path = stats.describe()
        rows.append(
            {
                "program": name,
                "path": path,
                "visible": float(stats.visible_blocks.float().mean()),
                "density": float(stats.density.mean()),
                **{f"{part} ms": value for part, value in times.items()},
                "estimate ratio": times["estimate"] / times["plain estimate"],
                "mask ratio": times["mask"] / times["plain mask"],
            }
        )
        row = rows[-1]
        print(
            f"{name:22} structure {row['structure ms']:7.3f} ms, estimate {row['estimate ms']:7.3f} ms = "
            f"{row['estimate ratio']:5.2f} of plain, mask {row['mask ms']:7.3f} ms = {row['mask ratio']:5.2f} of "
            f"plain; density {row['density']:.3f}; {path}",
            flush=True,
        )
    return rows


def compare_estimators(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """What moments and scan choose under every score mod, beside the scan of every single query in 8 bits."""
    length = args.compare_length
    query, key, *_ = generate(length, args.heads, args.kv_heads, args.head_dim, dtype=dtype, device=device)
    table = torch.randn(args.heads, 512, generator=torch.Generator().manual_seed(0)).to(device)
    scores = {
        "none": lambda score, b, h, q_idx, kv_idx: score,
        "alibi": mods.alibi(args.heads, device=device),
        "soft cap 50": mods.softcap(50.0),
        "soft cap 10": mods.softcap(10.0),
        "relative bias": mods.relative_bias(table),
        "relative bias x 4": mods.relative_bias(4 * table),
    }
    rows = []
    for name, score_mod in scores.items():
        kept = {}
        for label, change in (
            ("moments", {}),
            ("scan", {"sub_block": 1}),
            ("every query", {"pool": 1, "pool_mode": "last", "sub_block": 1, "bits": 8}),
        ):
            config = SaleConfig(Mass.fast(args.threshold, **change), min_length=0)
            kept[label] = block_map(create_sale_block_mask(query, key, config, score_mod=score_mod)).kept
        wanted = kept.pop("every query")
        row: dict[str, Any] = {"score_mod": name, "wanted": float(wanted.float().mean())}
        for label, found in kept.items():
            row[f"{label} kept"] = float(found.sum() / wanted.sum())
            row[f"{label} found"] = float((found & wanted).sum() / wanted.sum())
        rows.append(row)
        print(
            f"{name:18} moments keep {row['moments kept']:.3f} and find {row['moments found']:.4f}, scan keeps "
            f"{row['scan kept']:.3f} and finds {row['scan found']:.4f} of the blocks that single queries want",
            flush=True,
        )
    return rows


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    """Print a line per mod."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int, default=2048, help="tokens of the timed calls")
    parser.add_argument("--compare-length", type=int, default=2048, help="tokens of the comparison of estimators")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--threshold", type=float, default=0.005)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found = {"timed": time_programs(args, device, dtype), "compared": compare_estimators(args, device, dtype)}
    if args.json is not None:
        how = {name: value for name, value in vars(args).items() if name != "json"}
        args.json.write_text(json.dumps({**provenance(device), **how, **found}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
