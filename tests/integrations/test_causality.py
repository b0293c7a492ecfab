# SPDX-License-Identifier: BSD-3-Clause
"""Any causal LM of transformers: it sees what eager sees and nothing that comes later, or it says that it can not.

A layer that combines masks by hand would see later tokens through a mask without elements, and a model that maps the
implementation to another would do nothing at all: both without an error of their own.
"""

import pytest
import torch
import transformers
from causal_lms import CLASSES, build
from models_harness import EVERYTHING, LENGTH, assert_close, padding_mask, prefill, tokens
from torch import Tensor

import sale_flex.integrations.transformers as sale_hf

pytestmark = pytest.mark.usefixtures("uncompiled_attention")

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


def run_sparse(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Logits of a model from now on configured."""
    model.set_attn_implementation(sale_hf.NAME)
    sale_hf.configure(model, EVERYTHING)
    return prefill(model, ids)


@pytest.mark.filterwarnings("ignore")  # models' own
@pytest.mark.parametrize("name", [name for name in CLASSES if name not in NOT_BUILT])
def test_a_causal_lm(name):
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
