# SPDX-License-Identifier: BSD-3-Clause
"""A tiny model of every causal-LM type of the installed transformers, of one size as far as configs let it."""

from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_SIZES = {
    0.1: "initializer_range init_std",
    1: "n_group topk_group n_shared_experts",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers "
    "num_encoder_layers num_experts n_routed_experts num_local_experts num_experts_per_tok moe_num_experts moe_k "
    "moe_topk top_k_experts num_key_value_heads n_kv_heads num_kv_heads num_global_key_value_heads n_groups "
    "mamba_n_groups n_mamba_heads linear_num_key_heads",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads linear_num_value_heads",
    8: "mamba_n_heads mamba_num_heads",
    16: "hidden_size_per_layer_input qk_nope_head_dim qk_rope_head_dim mamba_d_state ssm_state_size state_size "
    "linear_key_head_dim linear_value_head_dim rotary_dim",
    32: "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
    "expert_ffn_hidden_size head_dim global_head_dim d_kv attention_head_dim d_head q_lora_rank kv_lora_rank "
    "v_head_dim qk_head_dim mamba_d_head mamba_head_dim",
    64: "intermediate_size ffn_dim n_inner d_ff d_inner ffn_hidden_size encoder_ffn_dim decoder_ffn_dim "
    "intermediate_size_mlp shared_intermediate_size dense_intermediate_size vocab_size n_vocab "
    "vocab_size_per_layer_input mamba_chunk_size chunk_size",
    128: "hidden_size n_embd d_model dim embed_dim emb_dim embedding_size word_embed_proj_dim width",
    256: "mamba_d_ssm",
    512: "max_position_embeddings n_positions n_ctx max_seq_len",
}
_SIZE_OF = {name: size for size, names in _SIZES.items() for name in names.split()}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 1}

_UNSET = object()
"""An option to leave to the config, whose class refuses it."""

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_HEADS = {"head_dim": 32, "num_key_value_heads": 2}
_EXPERTS = {"n_routed_experts": 2, "num_experts_per_tok": 2, "n_shared_experts": 1}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_CONV = {"layer_types": ["conv", "full_attention"]}
_LOCAL = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 50}

_OPTIONS: dict[str, dict[str, Any]] = {
    "BailingHybridForCausalLM": _LINEAR,
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "CohereCompassForCausalLM": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "DbrxForCausalLM": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "DeepseekV2ForCausalLM": _EXPERTS | {"topk_method": "greedy"},
    "Dots1ForCausalLM": _EXPERTS,
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "Gemma3nForCausalLM": _LOCAL | {"num_kv_shared_layers": 0},
    "Gemma4ForCausalLM": {"global_head_dim": 32},
    "Gemma4UnifiedForCausalLM": {"global_head_dim": 32},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["mamba", "attention"]},
    "HunYuanDenseV1ForCausalLM": _HEADS,
    "HunYuanMoEV1ForCausalLM": _HEADS,
    "JambaForCausalLM": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "KimiLinearForCausalLM": _LINEAR,
    "Lfm2MoeForCausalLM": _CONV,
    "Lfm3ForCausalLM": _CONV,
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 32},
    "MinistralForCausalLM": _HEADS,
    "NemotronForCausalLM": _HEADS,
    "ProphetNetForCausalLM": {"num_hidden_layers": _UNSET},
    "Qwen3NextForCausalLM": _LINEAR,
    "Qwen3_5ForCausalLM": _LINEAR,
    "Qwen3_5MoeForCausalLM": _LINEAR,
    "RecurrentGemmaForCausalLM": {"block_types": ["recurrent", "attention"]},
    "ReformerModelWithLMHead": {"axial_pos_embds": False},
    "XLMWithLMHeadModel": {"causal": True},
    "XLNetLMHeadModel": {"max_position_embeddings": _UNSET},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
}
"""Of the configs of some classes: at least one layer with attention, and what has no default that fits the sizes."""

CLASSES = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()))


def build(name: str) -> torch.nn.Module:
    """A model of random weights, the same at every call, that runs eager attention."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: torch.nn.Module = getattr(transformers, name)(config_of(name)).eval()
    model.set_attn_implementation("eager")
    return model


def config_of(name: str) -> Any:
    """A tiny config for a class of models."""
    return _tiny(getattr(transformers, name).config_class, _OPTIONS.get(name, {}))


def _tiny(kind: Any, options: dict[str, Any]) -> Any:
    try:
        default = kind()
    except Exception:  # that of some classes is not valid
        default = kind(**{option: value for option, value in options.items() if value is not _UNSET})
    made: dict[str, Any] = {}
    for name, size in _SIZE_OF.items():
        alias = getattr(kind, "attribute_map", {}).get(name)
        mine = getattr(kind, name, None)
        if alias in _SIZE_OF or (isinstance(mine, property) and mine.fset is None):
            continue
        if isinstance(_value(default, name), int | float) and not isinstance(_value(default, name), bool):
            made[name] = size
    if "kv_lora_rank" in made and "qk_rope_head_dim" in made:
        made |= {"num_key_value_heads": 4, **({"head_dim": 16} if hasattr(default, "head_dim") else {})}
    made |= {name: token for name, token in _TOKENS.items() if hasattr(default, name)}
    made |= {name: 0.0 for name, value in vars(default).items() if "drop" in name and isinstance(value, float)}
    for name in getattr(kind, "sub_configs", {}):
        if getattr(default, name, None) is not None:
            made[name] = _tiny(type(getattr(default, name)), {})
    if hasattr(default, "is_decoder"):
        made["is_decoder"] = True
    return kind(**{option: value for option, value in (made | options).items() if value is not _UNSET})


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:
        return 1  # a number per layer, which the config reads from a single one
