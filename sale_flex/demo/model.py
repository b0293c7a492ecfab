# SPDX-License-Identifier: BSD-3-Clause
"""The demo's language model, with an attention that is dense or SALE from one run to the next."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils import logging

from sale_flex import AuxRequest, SaleConfig, SaleStats, create_sale_block_mask, sale_attention
from sale_flex.testing import block_map

PACKAGED = Path(__file__).parent / "model"


class SwitchedAttention:
    """The attention of every layer of a demo model, by transformers' attention interface.

    Good for one unpadded prompt in one call, which is all the demo runs.
    """

    def __init__(self) -> None:
        self.config: SaleConfig | None = None
        """What SALE keeps; None is dense attention."""
        self.stats: list[SaleStats] = []
        """Stats of every SALE call, in the order of the layers."""
        self.maps: list[Tensor] | None = None
        """A list here collects every layer's kept blocks, bool `[Hq, nq, nk]` on the CPU."""

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Attend with query `[1, Hq, S, D]`, key and value `[1, Hkv, S, D]`; `[1, S, Hq, D]`."""
        if self.config is None:
            output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        else:
            wanted = AuxRequest(stats=True)
            output, aux = sale_attention(query, key, value, self.config, scale=scaling, return_aux=wanted)
            assert aux.stats is not None
            self.stats.append(aux.stats)
            if self.maps is not None:
                mask = create_sale_block_mask(query, key, self.config, value=value, scale=scaling)
                self.maps.append(block_map(mask).kept[0].cpu())
        return output.transpose(1, 2).contiguous(), None


def load(
    folder: Path | None, device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedModel, Tokenizer, SwitchedAttention]:
    """Load a model of transformers' layout and switch its attention to dense.

    Args:
        folder: Where config, weights and ``tokenizer.json`` are; None is the packaged model.
        device: Where to put the model.
        dtype: What to load its weights as.

    Raises:
        FileNotFoundError: The folder lacks one of them.
    """
    folder = PACKAGED if folder is None else folder
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"model must be a folder with config.json, weights and tokenizer.json, but "
                f"{folder} has no {name}; examples/train_recall_lm.py trains one"
            )
    attention = SwitchedAttention()
    AttentionInterface.register("sale_flex_demo", attention)
    AttentionMaskInterface.register("sale_flex_demo", _no_mask)
    logging.disable_progress_bar()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="sale_flex_demo", dtype=dtype
    )
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    nn.Module.to(model, device)  # transformers' own `to` is annotated as taking a model
    return model.eval(), tokenizer, attention


def _no_mask(*_: Any, **__: Any) -> None:
    """One whole prompt without padding: plain causal attention, which needs no mask."""
