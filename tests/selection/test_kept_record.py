# SPDX-License-Identifier: BSD-3-Clause
"""Plain calls keep the blocks that they kept when tests/data/kept_blocks.pt was recorded.

A guard for changes that are to change nothing. Blocks within a thousandth of the threshold, by levels, are not
compared: another CPU's sums over 900 keys may be off by a twentieth of that. To record anew, after a change of what is
meant: ``python tests/selection/test_kept_record.py``.
"""

from pathlib import Path

import pytest
import torch

from sale_flex import SaleConfig, create_sale_block_mask, reference
from sale_flex.blocks.bits import pack_bits, unpack_bits
from sale_flex.testing import Shape, block_map, structured_inputs

RECORD = Path(__file__).resolve().parents[1] / "data" / "kept_blocks.pt"

SHAPES = {
    "square": Shape(640, 640, heads=4, kv_heads=2, head_dim=64),
    "chunk": Shape(333, 900, heads=2, kv_heads=1, head_dim=80, q_offset=500),
    "padded": Shape(500, 500, batch=2, heads=3, kv_heads=3, head_dim=32, kv_range=((0, 490), (77, 500))),
}
CLOSE = 1e-3
MOMENTS = {"pool_mode": "mean", "sub_block": 8}
CONFIGS = {
    "default": {},
    "8th row": {"threshold": 0.03, "pool": 8, "pool_mode": "last"},
    "fast": MOMENTS | {"bits": 4, "threshold": 0.03},
    "moments of 4 in 8 bits": MOMENTS | {"pool": 2, "sub_block": 4},
    "means of queries": {"pool_mode": "mean", "bits": 4},
    "64 by 32": {"block_size": (64, 32)},
    "128 by 128": {"block_size": (128, 128)},
    "relative": {"rule": "relative", "threshold": 0.1, "bits": 4},
    "relative in 8 bits, 128 by 64": {"rule": "relative", "bits": 8, "threshold": 0.1, "block_size": (128, 64)},
}
CASES = [(shape, config) for shape in SHAPES for config in CONFIGS]


def kept_blocks(shape: str, config: str) -> tuple[torch.Tensor, SaleConfig, torch.Tensor, torch.Tensor]:
    """Kept blocks of a seeded case, bool ``[B, Hq, nq, nk]``, and what they were chosen from."""
    inputs = structured_inputs(SHAPES[shape], 11, topic=6.0)
    common = {"threshold": 0.05, "min_length": 0, "sink_tokens": 8, "local_tokens": 32, "smooth_tokens": 100}
    made = SaleConfig.from_options(**common | CONFIGS[config])
    mask = create_sale_block_mask(inputs.query, inputs.key, made, **SHAPES[shape].positions())
    return block_map(mask).kept, made, inputs.query, inputs.key


@pytest.mark.parametrize(("shape", "config"), CASES)
def test_kept_blocks_are_those_of_the_record(shape, config):
    kept, *_ = kept_blocks(shape, config)
    then, sure = (unpack_bits(words, kept.shape[-1]) for words in torch.load(RECORD)[shape, config])
    assert torch.equal(kept & sure, then & sure)
    assert sure.float().mean() > 0.9
    assert 0.1 < then.sum() / then.numel() < 0.6  # of a map of which about half is hidden


def record() -> None:
    """Write what the library keeps now."""
    found = {}
    for shape, config in CASES:
        kept, made, query, key = kept_blocks(shape, config)
        margin = reference.keep_map(query, key, made, **SHAPES[shape].positions()).margin
        sure = ~(margin.abs() < CLOSE)
        found[shape, config] = pack_bits(kept), pack_bits(sure.expand_as(kept))
    torch.save(found, RECORD)


if __name__ == "__main__":
    record()
