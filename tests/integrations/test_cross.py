# SPDX-License-Identifier: BSD-3-Clause
"""Encoders with decoders: cross-attention, whose queries have no place among the keys, sees what it should."""

import pytest
import torch
import transformers

import sale_flex.integrations.transformers as sale_hf
from sale_flex import Mass, SaleConfig

pytestmark = pytest.mark.usefixtures("uncompiled_attention")

EVERYTHING = SaleConfig(Mass(0.0), min_length=0, sink_tokens=0, local_tokens=1)

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


def _whisper(**shape):
    config = transformers.WhisperConfig(
        **shape, max_source_positions=80, max_target_positions=512, num_mel_bins=8, decoder_start_token_id=1
    )
    return transformers.WhisperForConditionalGeneration(config), {"input_features": torch.randn(2, 8, 160)}


def _text(name):
    def made(**shape):
        ids = {"decoder_start_token_id": 1}
        model = getattr(transformers, f"{name}ForConditionalGeneration", None) or getattr(
            transformers, f"{name}MTModel"
        )
        config = getattr(transformers, f"{name}Config")(**shape, max_position_embeddings=512, **ids)
        return model(config), {"input_ids": torch.randint(3, 64, (2, 160))}

    return made


KINDS = {name: _text(name) for name in ("Bart", "MBart", "Marian", "Pegasus", "Blenderbot", "M2M100")} | {
    "Whisper": _whisper
}


def encoder_decoder(name, implementation="eager", **options):
    """A model whose encoder has another number of layers and of heads than its decoder, and inputs of the encoder."""
    torch.manual_seed(0)
    shape = {name: value for name, value in SHAPE.items() if name != "max_position_embeddings"}
    shape |= {"encoder_layers": 3, "encoder_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model, inputs = KINDS[name](**shape | ids | options)
    sale_hf.register()
    model.set_attn_implementation(implementation)
    return model.eval(), inputs


def assert_sums_agree(logits, expected):
    # Four sums of at most 200 float32 products a decoder layer, in another order.
    assert float((logits - expected).abs().max()) < 200 * torch.finfo(torch.float32).eps * float(expected.abs().max())


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_self_attention_of_a_decoder_is_what_is_configured(name):
    others = torch.randint(3, 64, (2, 160), generator=torch.Generator().manual_seed(1))
    dense, inputs = encoder_decoder(name)
    model, _ = encoder_decoder(name, sale_hf.NAME)
    assert {index: sale_hf.query_heads(one) for index, one in sale_hf.attention_layers(model).items()} == {0: 4, 1: 4}
    sale_hf.configure(model, {0: EVERYTHING, 1: None})
    assert_sums_agree(*(each(**inputs, decoder_input_ids=others).logits for each in (model, dense)))
    first, second = sale_hf.stats(model).layers
    assert (first.sparse_calls, first.dense_calls, first.paths["dense: cross-attention"]) == (1, 1, 1)
    assert (second.sparse_calls, second.dense_calls, second.paths["dense: cross-attention"]) == (0, 2, 1)
    assert first.density == (1.0,) * 4


class TestBart:
    def inputs(self, padding=0):
        generator = torch.Generator().manual_seed(1)
        ids, others = (torch.randint(3, 64, (2, 160), generator=generator) for _ in range(2))
        mask = torch.ones_like(ids)
        mask[0, 160 - padding :] = 0
        return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": others}

    @torch.no_grad()
    def test_cross_attention_under_padding_is_dense_though_lengths_are_equal(self):
        model, dense = bart("sale_flex"), bart("eager")
        sale_hf.configure(model, EVERYTHING)
        inputs = self.inputs(padding=60)
        assert_sums_agree(model(**inputs).logits, dense(**inputs).logits)
        for layer in sale_hf.stats(model).layers:
            assert (layer.sparse_calls, layer.dense_calls) == (1, 1)
            assert layer.paths["dense: cross-attention"] == 1

    @torch.no_grad()
    def test_an_observer_sees_the_decoder_alone(self):
        model = bart("sale_flex")
        sale_hf.configure(model, EVERYTHING)
        seen = []

        def observer(call):
            seen.append(call.layer)
            return torch.zeros_like(call.query)

        with sale_hf.observe(model, observer):
            model(**self.inputs(padding=60))
        assert seen == [0, 1]

    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    def test_decoding_steps_of_both(self, cache):
        model = bart("sale_flex")
        sale_hf.configure(model, EVERYTHING)
        options = {"cache_implementation": cache, "max_new_tokens": 4, "do_sample": False, "disable_compile": True}
        inputs = self.inputs()
        assert torch.equal(model.generate(**inputs, **options), bart("eager").generate(**inputs, **options))
        for layer in sale_hf.stats(model).layers:
            assert layer.sparse_calls == 1
            assert layer.decode_calls + 1 == layer.dense_calls == layer.paths["dense: cross-attention"]

    @torch.no_grad()
    def test_parts_can_be_configured(self):
        model = bart("sale_flex")
        sale_hf.configure(model)
        sale_hf.configure(model.model.encoder, EVERYTHING)
        sale_hf.configure(model.model.decoder, EVERYTHING)
        model(**self.inputs())
        assert [layer.sparse_calls for layer in sale_hf.stats(model.model.encoder).layers] == [1, 1]
        assert [layer.sparse_calls for layer in sale_hf.stats(model.model.decoder).layers] == [1, 1]

    @torch.no_grad()
    def test_the_encoder_stays_dense(self):
        model = bart("sale_flex")
        sale_hf.configure(model, SaleConfig(Mass(1.0), min_length=0, sink_tokens=0, local_tokens=1))
        inputs = self.inputs()
        wanted = bart("eager").model.encoder(inputs["input_ids"]).last_hidden_state
        assert_sums_agree(model.model.encoder(inputs["input_ids"]).last_hidden_state, wanted)
