# SPDX-License-Identifier: BSD-3-Clause
"""Encoders with decoders: cross-attention, whose queries have no place among the keys, sees what it should."""

import pytest
import torch
import transformers

import sale_flex.integrations.transformers as sale_hf

SHAPE = {
    "d_model": 128,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 64,
    "max_position_embeddings": 512,
    "init_std": 0.1,
    "dropout": 0.0,
}


def bart(implementation):
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**SHAPE, **ids)).eval()
    sale_hf.register()
    model.set_attn_implementation(implementation)
    return model


@pytest.mark.parametrize("padding", [0, 60])
@pytest.mark.parametrize("decoded", [20, 120, 160, 200])
def test_a_decoder_sees_its_encoder_whatever_their_lengths(decoded, padding):
    generator = torch.Generator().manual_seed(1)
    ids, others = (torch.randint(3, 64, (2, length), generator=generator) for length in (160, decoded))
    mask = torch.ones_like(ids)
    mask[0, 160 - padding :] = 0
    with torch.no_grad():
        expected, logits = (
            bart(name)(input_ids=ids, attention_mask=mask, decoder_input_ids=others).logits
            for name in ("eager", "sale_flex")
        )
    # Four sums of at most 200 float32 products a decoder layer, in another order.
    assert float((logits - expected).abs().max()) < 200 * torch.finfo(torch.float32).eps * float(expected.abs().max())
