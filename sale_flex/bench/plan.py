# SPDX-License-Identifier: BSD-3-Clause
"""What a benchmark is to measure, and how that is read from the command line."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from sale_flex._console.provenance import provenance
from sale_flex._console.stored import stored_config
from sale_flex.bench.baselines import BASELINES
from sale_flex.bench.configs import parse_configs
from sale_flex.bench.inputs import FromFile, Synthetic
from sale_flex.bench.results import Row
from sale_flex.config import BLOCK_SIZES, SaleConfig

T = TypeVar("T")

DTYPES = ("bfloat16", "float16", "float32")
SHAPE = {"heads": 32, "kv_heads": 8, "head_dim": 128, "batch": 1, "outliers": 0, "seed": 0}
"""Options of the generator -> their defaults, the attention of Llama-3.1-8B."""
LENGTHS = {"cuda": "4096,8192,16384,32768,65536,131072", "cpu": "2048,4096"}
"""Kind of device -> what ``--lengths`` is by default."""


@dataclass(frozen=True)
class Plan:
    """What to measure: every length with every config at every density."""

    lengths: Sequence[int]
    """In tokens."""
    configs: Mapping[str, SaleConfig]
    """By name."""
    densities: Sequence[float | None]
    """Shares of the visible blocks to keep; None for the config's own threshold."""
    baselines: Sequence[str]
    """Names of `sale_flex.bench.baselines.BASELINES`."""
    source: Synthetic | FromFile
    rounds: int
    device: torch.device
    keep_compiled: bool = False
    """Whether programs of one length are there when the next one runs, which makes the compiler's lengths dynamic."""

    def settings(self, length: int) -> list[Row]:
        """The fields that say what each setting of a length is."""
        asked = {"length": length, **self.source.fields()}
        origin = provenance(self.device)
        rest = {"baselines": list(self.baselines), "keep_compiled": self.keep_compiled}
        return [
            asked
            | {"config": name, "config_fields": stored_config(config, threshold=True), "target_density": density}
            | rest
            | origin
            for name, config in self.configs.items()
            for density in self.densities
        ]

    @property
    def size(self) -> int:
        """How many settings there are."""
        return len(self.lengths) * len(self.configs) * len(self.densities)


def make_plan(args: argparse.Namespace) -> Plan:
    """What the arguments ask for; ValueError where that cannot be measured."""
    device = find_device(args.device)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    shape = {name: getattr(args, name) for name in SHAPE}
    given = [f"--{name.replace('_', '-')}" for name, value in shape.items() if value is not None]
    source: FromFile | Synthetic
    if args.qkv is not None:
        if given:
            raise ValueError(f"{given[0]} cannot be chosen with --qkv, whose tensors are what they are")
        source = FromFile(args.qkv, args.layer, dtype)
    else:
        if args.layer is not None:
            raise ValueError("--layer chooses a layer of --qkv, which is not given")
        usual = torch.float32 if device.type == "cpu" else torch.bfloat16
        sizes = {name: default if shape[name] is None else shape[name] for name, default in SHAPE.items()}
        source = Synthetic(**sizes, dtype=dtype or usual)
    text = args.lengths or LENGTHS[device.type]
    lengths = parse_list("--lengths", text, int, "numbers of tokens, 64 or more", lambda x: x >= 64)
    if source.longest is not None and max(lengths) > source.longest:
        raise ValueError(f"--lengths must not exceed the {source.longest} tokens in {args.qkv}, got {max(lengths)}")
    densities: list[float | None] = [None]
    if args.densities is not None:
        densities = [*parse_list("--densities", args.densities, float, "shares above 0, up to 1", _is_share)]
    configs = parse_configs(args.configs)
    if args.block_size is not None:
        size = parse_block_size(args.block_size)
        configs = {name: replace(config, block_size=size) for name, config in configs.items()}
    if args.rounds < 1:
        raise ValueError(f"--rounds must be 1 or more, got {args.rounds}")
    baselines = parse_list("--baselines", args.baselines, str, f"among {', '.join(BASELINES)}", BASELINES.__contains__)
    return Plan(lengths, configs, densities, baselines, source, args.rounds, device, args.keep_compiled)


def parse_block_size(text: str) -> tuple[int, int]:
    """Read ``--block-size``.

    Raises:
        ValueError: There are no such blocks.
    """
    for rows, keys in BLOCK_SIZES:
        if text == f"{rows},{keys}":
            return rows, keys
    known = "; ".join(f"{rows},{keys}" for rows, keys in BLOCK_SIZES)
    raise ValueError(f"--block-size must be rows,keys, one of {known}; got {text!r}")


def parse_list(option: str, text: str, kind: Callable[[str], T], rule: str, holds: Callable[[T], bool]) -> list[T]:
    """The parts of a comma-separated option, each once."""
    try:
        parts = [kind(part.strip()) for part in text.split(",")]
    except ValueError:
        parts = []
    if not parts or not all(map(holds, parts)) or len(set(parts)) < len(parts):
        raise ValueError(f"{option} must be {rule}, separated by commas and each once, got {text!r}")
    return parts


def _is_share(number: float) -> bool:
    return 0 < number <= 1


def find_device(name: str | None) -> torch.device:
    """The device of a name, by default the first CUDA device or the CPU; a CUDA device becomes the current one.

    Raises:
        ValueError: There is no such device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = ["cpu", *(f"cuda:{index}" for index in range(count))]
    if name is None or name == "cuda":
        name = "cuda:0" if count or name == "cuda" else "cpu"
    if name not in known:
        raise ValueError(f"--device must be {' or '.join(known)}, got {name!r}; torch finds {count} CUDA devices")
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # Triton launches on the current one
    return device
