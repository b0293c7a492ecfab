# SPDX-License-Identifier: BSD-3-Clause
"""Models of transformers whose attention is not what sale_attention computes, each with its reason.

None of them would fail by itself, or not with a sentence: some run other attention than they were asked for, some hand
over a mask that lacks causality. tests/integrations/test_causality.py looks for more of them.
"""

from typing import Any

NAME = "sale_flex"
"""The value of ``attn_implementation``."""

_OWN_SPARSE = "chooses keys by itself, from the elements of a mask"
_BIAS = "adds a tensor of biases to its logits"
_COMPRESSED = "attends to compressed keys besides, under a mask that it extends by hand"

REFUSED = {
    "axk2": _OWN_SPARSE,
    "deepseek_v32": _OWN_SPARSE,
    "deepseek_v4": _COMPRESSED,
    "doge": "makes a mask of its own and combines it by hand with the elements of the causal one",
    "dots3_note": _OWN_SPARSE,
    "dots3_note_text": _OWN_SPARSE,
    "falcon": "calls scaled_dot_product_attention by itself, whatever attn_implementation says",
    "glm5_next": _OWN_SPARSE,
    "glm5_next_text": _OWN_SPARSE,
    "glm_moe_dsa": _OWN_SPARSE,
    "hy_v4": _OWN_SPARSE,
    "hy_v4_vl": _OWN_SPARSE,
    "hy_v4_vl_text": _OWN_SPARSE,
    "inkling2_loop_text": _BIAS,
    "inkling2_text": _BIAS,
    "inkling_text": _BIAS,
    "longt5": _BIAS,
    "minimax_m3_vl": _OWN_SPARSE,
    "minimax_m3_vl_text": _OWN_SPARSE,
    "mistral_large4": _OWN_SPARSE,
    "mistral_large4_text": _OWN_SPARSE,
    "mt5": _BIAS,
    "pix2struct_text_model": _BIAS,
    "pop2piano": _BIAS,
    "qwen4_exp": _OWN_SPARSE,
    "qwen4_exp_text": _OWN_SPARSE,
    "switch_transformers": _BIAS,
    "t5": _BIAS,
    "udop": _BIAS,
    "umt5": _BIAS,
}
"""``config.model_type`` -> what its attention does."""


class UnsupportedModelError(NotImplementedError, ValueError):
    """A model whose attention sale_flex does not compute."""


def refuse(config: Any) -> None:
    """Do nothing for the config of a model that is not refused, or without a model type.

    Raises:
        UnsupportedModelError: The model is refused.
    """
    model_type = getattr(config, "model_type", None)
    reason = REFUSED.get(model_type) if isinstance(model_type, str) else None
    if reason is not None:
        raise UnsupportedModelError(
            f"model must have attention that attn_implementation={NAME!r} computes, but {model_type!r} {reason}; use "
            "attn_implementation='sdpa' or 'eager' for it."
        )
