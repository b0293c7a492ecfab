# SPDX-License-Identifier: BSD-3-Clause
"""Any causal LM of transformers: it sees what eager sees and nothing that comes later, or it says that it can not.

A layer that combines masks by hand would see later tokens through a mask without elements, and a model that maps the
implementation to another would do nothing at all: both without an error of their own.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

import sale_flex.integrations.transformers as sale_hf

sys.path.append(str(Path(__file__).resolve().parent))
from causal_lms import CLASSES, build
from models_harness import EVERYTHING, LENGTH, PADDED, assert_close, padding_mask, tokens

FIRST = 100
"""Tokens that stay the same; the first block ends before, the second behind."""

NOT_BUILT = {}

RAISING = {}


def blocks_of(count: Tensor, indices: Tensor) -> Tensor:
    """bool ``[B, H, rows, columns]`` of lists of block indices."""
    columns = indices.shape[-1]
    listed = torch.arange(columns) < count[..., None]
    seen = torch.zeros(*indices.shape[:-1], columns + 1, dtype=torch.bool)
    return seen.scatter_(-1, torch.where(listed, indices, columns).long(), True)[..., :columns]


def attention_on_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    scale: float,
    kernel_options: Any = None,
    score_mod: Any = None,
    *_: Any,
) -> tuple[Tensor, None]:
    """What flex_attention computes, in plain torch: its programs would take minutes to compile."""
    rows, keys, heads = query.shape[2], key.shape[2], query.shape[1]
    where = [torch.arange(n) for n in (query.shape[0], heads, rows, keys)]
    b, h, q, k = (x.view([-1 if i == j else 1 for j in range(4)]) for i, x in enumerate(where))

    def elements(blocks: Tensor) -> Tensor:
        high, wide = (
            x.repeat_interleave(size) for x, size in zip(map(torch.arange, blocks.shape[2:]), mask.BLOCK_SIZE)
        )
        return blocks[:, :, high][..., wide][:, :, :rows, :keys]

    seen = elements(blocks_of(mask.kv_num_blocks, mask.kv_indices)) & mask.mask_mod(b, h, q, k)
    if mask.full_kv_num_blocks is not None:
        seen = seen | elements(blocks_of(mask.full_kv_num_blocks, mask.full_kv_indices))
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    if score_mod is not None:
        scores = score_mod(scores, b, h, q, k)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num()
    return weights @ value, None


@torch.no_grad()
def logits_of(model: torch.nn.Module, ids: Tensor, **options: Any) -> Tensor:
    return model(ids, **options).logits


@pytest.mark.filterwarnings("ignore")  # models' own
@pytest.mark.parametrize("name", [name for name in CLASSES if name not in NOT_BUILT])
def test_a_causal_lm(name, monkeypatch):
    monkeypatch.setattr("sale_flex.attention.run_flex", attention_on_blocks)
    model, ids, mask = build(name), tokens(), padding_mask("left")
    later = torch.cat([ids[:, :FIRST], tokens(length=LENGTH - FIRST, seed=2)], 1)
    if name in RAISING:
        with pytest.raises((ValueError, NotImplementedError), match=RAISING[name]):
            model.set_attn_implementation(sale_hf.NAME)
            sale_hf.configure(model, EVERYTHING)
            logits_of(model, ids)
        return
    expected = [logits_of(model, ids), logits_of(model, ids, attention_mask=mask)]
    model.set_attn_implementation(sale_hf.NAME)
    sale_hf.configure(model, EVERYTHING)
    logits = logits_of(model, ids)
    counted = sale_hf.stats(model)
    assert all(layer.sparse_calls > 0 == layer.dense_calls for layer in counted.layers), str(counted)
    assert_close(logits, expected[0])
    assert_close(logits_of(model, later)[:, :FIRST], logits[:, :FIRST])
    assert_close(logits_of(model, ids, attention_mask=mask), expected[1], mask)
