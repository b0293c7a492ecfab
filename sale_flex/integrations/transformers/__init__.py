# SPDX-License-Identifier: BSD-3-Clause
"""Hugging Face transformers: ``attn_implementation="sale_flex"``.

Long prompts prefill sparsely; decoding, caches, padding, packed sequences, generation, autocast, offloading and
torch.compile go on working. Hidden states of padding tokens differ from those of ``"sdpa"``: their attention is 0 in a
causal prompt, and valid tokens never see them.

Example:
    >>> import sale_flex.integrations.transformers as sale_hf
    >>> sale_hf.register()
    >>> model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sale_flex", dtype=torch.bfloat16)
    >>> sale_hf.configure(model, SaleConfig(threshold=0.01))
    >>> model.generate(**inputs)
    >>> print(sale_hf.stats(model))
"""

try:
    import transformers
    from transformers import AttentionInterface, AttentionMaskInterface
except ImportError as error:
    raise ModuleNotFoundError(
        "sale_flex.integrations.transformers needs transformers 5.17 or later: pip install 'sale-flex[hf]'.",
        name="transformers",
    ) from error

from sale_flex.integrations.transformers.calls import AttentionCall, observe
from sale_flex.integrations.transformers.configure import configure
from sale_flex.integrations.transformers.forward import sale_flex_forward
from sale_flex.integrations.transformers.layers import attention_layers, query_heads
from sale_flex.integrations.transformers.masks import ModelMask, sale_flex_mask
from sale_flex.integrations.transformers.refused import NAME, UnsupportedModelError
from sale_flex.integrations.transformers.stats import LayerStats, ModelStats, reset_stats, stats

OLDEST = (5, 17)
"""Version of transformers from which on its masks and attention functions are called as here."""

__all__ = [
    "NAME",
    "AttentionCall",
    "LayerStats",
    "ModelMask",
    "ModelStats",
    "UnsupportedModelError",
    "attention_layers",
    "configure",
    "observe",
    "query_heads",
    "register",
    "reset_stats",
    "sale_flex_forward",
    "sale_flex_mask",
    "stats",
]


def register() -> None:
    """Make ``attn_implementation="sale_flex"`` known to transformers in this process, before a model is loaded.

    Raises:
        ImportError: transformers is older than 5.17.
    """
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST:
        raise ImportError(
            f"attn_implementation={NAME!r} needs transformers {OLDEST[0]}.{OLDEST[1]} or later, got "
            f"{transformers.__version__}: pip install --upgrade 'sale-flex[hf]'."
        )
    AttentionInterface.register(NAME, sale_flex_forward)
    AttentionMaskInterface.register(NAME, sale_flex_mask)
