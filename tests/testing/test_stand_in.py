# SPDX-License-Identifier: BSD-3-Clause
"""The stand-in for compiled attention, beside it: lists followed, mods applied, rows of nothing, dtypes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_harness import CALLERS, attend_listed, attention_by
from torch import Tensor

import sale_flex
from sale_flex import Mass, SaleConfig, mods, sale_attention
from sale_flex.flex.run import run_flex
from sale_flex.testing import (
    Shape,
    block_map,
    causal_mask,
    expand_blocks,
    low_precision_budget,
    mod_mask,
    structured_inputs,
)

SOURCE = Path(sale_flex.__file__).parent
SPARSE = SaleConfig(Mass(0.05), min_length=0, local_tokens=16, sink_tokens=4, smooth_tokens=64)
IDS = torch.tensor([0] * 120 + [1] * 180)
PADDED = ((70, 300), (0, 300))

CASES: dict[str, tuple[dict[str, Any], Callable[[Tensor], dict[str, Any]]]] = {
    "plain": ({}, lambda query: {}),
    # Every third query of the first batch row sees nothing, in blocks that the others' keys are in.
    "padding and a mask with empty rows": (
        {"batch": 2, "kv_range": PADDED},
        lambda query: {"mask_mod": lambda b, h, q, k: (b > 0) | (q % 3 > 0)},
    ),
    "a mask and a score of every index": (
        {"batch": 2},
        lambda query: {
            "mask_mod": mods.document(IDS),
            "score_mod": lambda s, b, h, q, k: s + 0.02 * (h + 1) * (k - q).clamp(min=-50) * (b + 1),
        },
    ),
    "bfloat16": ({"dtype": torch.bfloat16}, lambda query: {}),
}


@pytest.mark.parametrize(("differs", "options"), CASES.values(), ids=CASES)
def test_it_computes_what_a_compiled_program_does(differs, options):
    shape = Shape(300, 300, heads=4, kv_heads=2, head_dim=32, **differs)
    calls = []

    def both(query, key, value, block_mask, scale, kernel_options, score_mod, *flags):
        given = (query, key, value, block_mask, scale, kernel_options, score_mod, *flags)
        seen = expand_blocks(block_map(block_mask).kept, block_mask.BLOCK_SIZE, 300, 300) & causal_mask(shape)
        seen = seen & mod_mask(block_mask.mask_mod, *query.shape[:2], 300, 300)
        output = attend_listed(*given)
        calls.append((output[0], run_flex(*given)[0], seen))
        return output

    inputs = structured_inputs(shape, 3)
    made = options(inputs.query)
    with attention_by(both):
        sale_attention(*inputs, SPARSE, **made, **shape.positions())
    ((output, expected, seen),) = calls
    assert (output.dtype, output.shape) == (expected.dtype, expected.shape)
    assert not torch.equal(seen, causal_mask(shape).expand_as(seen))
    assert not output[~seen.any(-1)].any()
    assert not expected[~seen.any(-1)].any()
    exact, budget = low_precision_budget(*inputs, seen, score_mod=made.get("score_mod"))
    for each in (output, expected):
        assert float((each.double() - exact).abs().max()) <= budget


def test_a_block_that_no_list_names_is_not_seen_whatever_the_mask_mod_says():
    shape = Shape(256, 256, heads=2, head_dim=32)
    query, key, value = structured_inputs(shape, 1)
    lists = []

    def look(query, key, value, block_mask, *given):
        lists.append(block_map(block_mask).kept)
        return attend_listed(query, key, value, block_mask, *given)

    with attention_by(look):
        output = sale_attention(query, key, value, SPARSE.with_options(threshold=100.0))
        (kept,) = lists
        assert not bool(kept[:, :, 3, 1].any())
        value[:, :, 64:128] += 100
        changed = sale_attention(query, key, value, SPARSE.with_options(threshold=100.0))
    assert torch.equal(output[:, :, 192:], changed[:, :, 192:])


class Attention(torch.nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sale_attention(query, key, value, SPARSE)


def test_a_compiled_caller_gets_compiled_attention():
    inputs = structured_inputs(Shape(160, 160, heads=2, head_dim=32), 1)
    with attention_by(attend_listed):
        compiled = torch.compile(lambda *x: sale_attention(*x, SPARSE), fullgraph=True, backend="aot_eager")
        output = compiled(*inputs)
        graph = torch.export.export(Attention(), tuple(inputs)).graph
    assert output.shape == inputs.query.shape
    assert any("flex_attention" in str(node.target) for node in graph.nodes)


def test_every_caller_is_replaced():
    used = {
        "sale_flex." + ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        for path in SOURCE.rglob("*.py")
        if "run_flex(" in path.read_text() and path.parent.name != "flex"
    }
    assert used == set(CALLERS)
