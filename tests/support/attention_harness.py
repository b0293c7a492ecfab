# SPDX-License-Identifier: BSD-3-Clause
"""Attention without a compiler, for tests whose subject is what attention is given and not how it is computed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from sale_flex.flex.run import run_flex
from sale_flex.mods import ScoreMod
from sale_flex.testing import block_map, dense_attention, expand_blocks, mod_mask

CALLERS = ("sale_flex.attention", "sale_flex.bench.stages", "sale_flex.calibration.search")
"""Modules with a `run_flex`."""


def attend_listed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    scale: float,
    kernel_options: dict[str, Any] | None = None,
    score_mod: ScoreMod | None = None,
    return_lse: bool = False,
    *flags: bool,
) -> tuple[Tensor, Tensor | None]:
    """What `run_flex` computes on a CPU, in plain float32: attention on the blocks that the index lists name.

    The mask_mod is asked in partial blocks alone, as by the compiled kernel, and lists that break a rule are an
    AssertionError. A GPU and a caller's compiled program get `run_flex` itself.
    """
    if query.is_cuda or torch.compiler.is_compiling():
        return run_flex(query, key, value, block_mask, scale, kernel_options, score_mod, return_lse, *flags)
    assert not return_lse, "on a CPU flex_attention has none"
    lengths = query.shape[2], key.shape[2]
    assert block_mask.seq_lengths == lengths
    blocks = block_map(block_mask)
    partial, full = (expand_blocks(x, block_mask.BLOCK_SIZE, *lengths) for x in blocks)
    seen = full | partial & mod_mask(block_mask.mask_mod, *query.shape[:2], *lengths)
    tensors = (x.detach() for x in (query, key, value))
    output = dense_attention(*tensors, seen, score_mod=score_mod, scale=scale, dtype=torch.float32)
    return output.detach().to(query.dtype), None


@contextmanager
def attention_by(attend: Any) -> Iterator[None]:
    """`attend` in the place of `run_flex`, wherever that is called."""
    with pytest.MonkeyPatch.context() as patch:
        for module in CALLERS:
            patch.setattr(f"{module}.run_flex", attend)
        yield
