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
import transformers
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

import sale_flex.integrations.transformers as sale_hf

sys.path.append(str(Path(__file__).resolve().parent))
from causal_lms import CLASSES, build
from models_harness import EVERYTHING, LENGTH, assert_close, padding_mask, prefill, tokens

FIRST = 100
"""Tokens that stay the same; the first block ends before, the second behind."""

NOT_BUILT = {
    "BltForCausalLM": "its parts have models of their own, whose sizes depend on one another",
    "Gemma3nForConditionalGeneration": "its vision tower needs timm; Gemma3nForCausalLM is the rest of it",
    "Gemma4AssistantForCausalLM": "it takes the keys of another model",
    "Gemma4UnifiedAssistantForCausalLM": "it takes the keys of another model",
    "MusicgenForCausalLM": "it takes several ids a token",
    "MusicgenMelodyForCausalLM": "it takes several ids a token",
    "Zamba2ForCausalLM": "its shared layers want more of them than are tiny",
    "ZambaForCausalLM": "its shared layers want more of them than are tiny",
}
"""Class -> why there is no model to look at."""

NO_LAYERS = "with a layer_idx and is_causal"
"""Models without softmax attention, and models whose attention does not go through transformers' interface."""

TWICE = "one attention module per layer index"
"""Models that run layers of two stacks in turn, or whose attention modules do not tell what they are."""

OTHER = "model must have attention that attn_implementation='sale_flex' computes"
"""Models in `REFUSED`."""

ELSEWHERE = "model must run attn_implementation='sale_flex'"
"""Models that stay with another implementation."""

TOO_WIDE = "heads of at most 256 channels"

RAISING = {
    "AXK2ForCausalLM": OTHER,
    "BigBirdForCausalLM": NO_LAYERS,
    "BigBirdPegasusForCausalLM": TWICE,
    "BloomForCausalLM": NO_LAYERS,
    "CpmAntForCausalLM": NO_LAYERS,
    "DeepseekV32ForCausalLM": OTHER,
    "DeepseekV4ForCausalLM": OTHER,
    "DogeForCausalLM": OTHER,
    "Dots3NoteForCausalLM": OTHER,
    "FalconForCausalLM": OTHER,
    "FalconMambaForCausalLM": NO_LAYERS,
    "GPTNeoForCausalLM": NO_LAYERS,
    "GPTNeoXJapaneseForCausalLM": NO_LAYERS,
    "Gemma4ForConditionalGeneration": TOO_WIDE,
    "Gemma4UnifiedForConditionalGeneration": TOO_WIDE,
    "GitForCausalLM": NO_LAYERS,
    "GlmMoeDsaForCausalLM": OTHER,
    "HYV4ForCausalLM": OTHER,
    "HrmTextForCausalLM": TWICE,
    "Inkling2ForCausalLM": OTHER,
    "Inkling2LoopForCausalLM": OTHER,
    "InklingForCausalLM": OTHER,
    "Mamba2ForCausalLM": NO_LAYERS,
    "MambaForCausalLM": NO_LAYERS,
    "MegatronBertForCausalLM": NO_LAYERS,
    "MiniMaxM3VLForCausalLM": OTHER,
    "MptForCausalLM": NO_LAYERS,
    "MvpForCausalLM": NO_LAYERS,
    "OpenAIGPTLMHeadModel": NO_LAYERS,
    "ProphetNetForCausalLM": NO_LAYERS,
    "Qwen4ExpForCausalLM": OTHER,
    "ReformerModelWithLMHead": NO_LAYERS,
    "RemBertForCausalLM": NO_LAYERS,
    "RoFormerForCausalLM": NO_LAYERS,
    "RwkvForCausalLM": NO_LAYERS,
    "TrOCRForCausalLM": NO_LAYERS,
    "XGLMForCausalLM": NO_LAYERS,
    "XLMWithLMHeadModel": NO_LAYERS,
    "XLNetLMHeadModel": NO_LAYERS,
    "xLSTMForCausalLM": NO_LAYERS,
}
"""Class -> what it says instead. All others run sparse."""

if transformers.__version__.startswith("5.17."):
    RAISING |= {"CodeGenForCausalLM": NO_LAYERS, "GPTJForCausalLM": ELSEWHERE}
    NOT_BUILT["MoshiForCausalLM"] = "its eager attention in transformers 5.17 sees later tokens where there is no mask"
    NOT_BUILT["CohereCompassForCausalLM"] = "transformers 5.17 does not initialise it at this size"


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


def run_sparse(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Logits of a model from now on configured."""
    model.set_attn_implementation(sale_hf.NAME)
    sale_hf.configure(model, EVERYTHING)
    return prefill(model, ids)


@pytest.mark.filterwarnings("ignore")  # models' own
@pytest.mark.parametrize("name", [name for name in CLASSES if name not in NOT_BUILT])
def test_a_causal_lm(name, monkeypatch):
    monkeypatch.setattr("sale_flex.attention.run_flex", attention_on_blocks)
    model, ids, mask = build(name), tokens(), padding_mask("left")
    later = torch.cat([ids[:, :FIRST], tokens(length=LENGTH - FIRST, seed=2)], 1)
    if name in RAISING:
        with pytest.raises((ValueError, NotImplementedError), match=RAISING[name]):
            run_sparse(model, ids)
        return
    expected = [prefill(model, ids), prefill(model, ids, mask)]
    logits = run_sparse(model, ids)
    counted = sale_hf.stats(model)
    assert all(layer.sparse_calls > 0 == layer.dense_calls for layer in counted.layers), str(counted)
    assert_close(logits, expected[0])
    assert_close(prefill(model, later)[:, :FIRST], logits[:, :FIRST])
    assert_close(prefill(model, ids, mask), expected[1], mask)
