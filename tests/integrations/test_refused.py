# SPDX-License-Identifier: BSD-3-Clause
"""What the integration refuses, and what it takes as it comes: holes, mask tensors, models that nobody configured."""

import json
import subprocess
import sys
from types import SimpleNamespace

import causal_lms
import pytest
import torch
import transformers
from models_harness import (
    BASE,
    BY_NAME,
    EVERYTHING,
    LAYERS,
    LENGTH,
    PADDED,
    assert_calls,
    assert_close,
    assert_sparse_paths,
    build,
    config_of,
    packed_positions,
    prefill,
    shared,
    tokens,
)
from torch.nn.attention.flex_attention import create_block_mask
from transformers import masking_utils

import sale_flex.integrations.transformers as sale_hf
from sale_flex import Mass, SaleConfig
from sale_flex.stats import Path as Ran

pytestmark = pytest.mark.usefixtures("uncompiled_attention")

LLAMA = BY_NAME["Llama"]


@pytest.fixture
def llama():
    return build(LLAMA, sale_hf.NAME)


class TestRefused:
    @pytest.mark.parametrize("length", [LENGTH, 8])
    @pytest.mark.parametrize("name", ["Llama", "Gemma2", "Qwen3Next", "Bert"])
    def test_attention_weights_of_a_call(self, name, length):
        model = build(BY_NAME[name], sale_hf.NAME)
        with pytest.raises(NotImplementedError, match=r"output_attentions.*attn_implementation='eager'"):
            prefill(model, tokens(length=length), output_attentions=True)

    def test_attention_weights_of_a_config(self, llama):
        with pytest.raises(ValueError, match=r"output_attentions.*not supported.*sale_flex"):
            llama.config.output_attentions = True

    def test_attention_weights_of_a_config_made_with_them(self):
        config = transformers.LlamaConfig(**BASE, output_attentions=True)
        with pytest.raises((ValueError, NotImplementedError), match="output_attentions"):
            prefill(transformers.LlamaForCausalLM._from_config(config, attn_implementation=sale_hf.NAME), tokens())

    def test_attention_weights_of_generate(self, llama):
        with pytest.raises(NotImplementedError, match="output_attentions"):
            llama.generate(tokens(), max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)

    def test_continuous_batching(self, llama):
        prompts = [tokens(1)[0].tolist()]
        with pytest.raises((ValueError, NotImplementedError, KeyError), match=r"sale_flex|paged"):
            llama.generate_batch(prompts, max_new_tokens=2)

    def test_a_paged_cache(self, llama):
        layer = sale_hf.attention_layers(llama)[0]
        x = torch.zeros(1, 4, 64, 32)
        with pytest.raises(NotImplementedError, match="continuous batching"):
            sale_hf.sale_flex_forward(layer, x, x, x, None, cache=object())

    @torch.no_grad()
    def test_dropout_in_training(self):
        model = build(LLAMA, sale_hf.NAME, attention_dropout=0.1).train()
        with pytest.raises(NotImplementedError, match=r"no attention dropout, got 0\.1; call model\.eval"):
            model(tokens())

    def test_gradients_on_a_cpu(self, llama):
        with pytest.raises(NotImplementedError, match="no gradients on cpu"):
            llama(tokens())

    def test_a_position_bias(self, llama):
        layer = sale_hf.attention_layers(llama)[0]
        x = torch.zeros(1, 4, 64, 32)
        with pytest.raises(NotImplementedError, match="no position_bias"):
            sale_hf.sale_flex_forward(layer, x, x, x, None, position_bias=torch.zeros(1, 4, 64, 64))

    def test_heads_that_are_too_wide(self):
        model = build(LLAMA, sale_hf.NAME, head_dim=288)
        with pytest.raises(ValueError, match="at most 256 channels, got 288"):
            prefill(model, tokens())

    def test_holes_in_a_compiled_program(self, llama):
        torch._dynamo.reset()
        compiled = torch.compile(llama, fullgraph=True, backend="aot_eager")
        with pytest.raises(ValueError, match="must not have padding between valid tokens"):
            prefill(compiled, tokens(), holed(), use_cache=False)

    def test_a_model_mask_evaluated(self):
        mask = sale_hf.sale_flex_mask(2, LENGTH, LENGTH, attention_mask=holed().bool())
        with pytest.raises(TypeError, match="create_sale_block_mask"):
            mask.mask_mod(*torch.zeros(4, dtype=torch.int64))


class TestModelsOfOtherAttention:
    """Models that would run something else than they were asked for, without a word."""

    @pytest.mark.parametrize("length", [LENGTH, 8])
    @pytest.mark.parametrize("name", ["DogeForCausalLM", "DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"])
    def test_by_configure_and_by_a_call(self, name, length):
        model = causal_lms.build(name)
        model.set_attn_implementation(sale_hf.NAME)
        for use in (sale_hf.configure, sale_hf.attention_layers, lambda model: prefill(model, tokens(length=length))):
            with pytest.raises(sale_hf.UnsupportedModelError, match=r"model must have attention that .* use attn_impl"):
                use(model)

    def test_falcon_which_maps_the_implementation_back(self):
        model = causal_lms.build("FalconForCausalLM")
        model.set_attn_implementation(sale_hf.NAME)
        with pytest.raises(ValueError, match=r"'falcon' calls scaled_dot_product_attention by itself"):
            sale_hf.configure(model)

    def test_both_kinds_of_errors_catch_it(self):
        assert issubclass(sale_hf.UnsupportedModelError, ValueError)
        assert issubclass(sale_hf.UnsupportedModelError, NotImplementedError)


RUNS_SDPA = (
    r"must run attn_implementation='sale_flex', but layer 0 \(LlamaAttention\) runs 'sdpa'.*set_attn_implementation"
)


class TestAnotherImplementation:
    def test_configure(self):
        model = build(LLAMA, "sdpa")
        before = dict(vars(shared(LLAMA).model.layers[0].self_attn))
        with pytest.raises(ValueError, match=RUNS_SDPA):
            sale_hf.configure(model)
        assert vars(model.model.layers[0].self_attn).keys() == before.keys()

    def test_observe_after_a_change(self, llama):
        llama.set_attn_implementation("sdpa")
        with pytest.raises(ValueError, match=RUNS_SDPA), sale_hf.observe(llama, lambda call: call.query):
            pass

    def test_stats_that_would_be_empty(self, llama):
        llama.set_attn_implementation("sdpa")
        prefill(llama, tokens())
        with pytest.raises(ValueError, match=RUNS_SDPA):
            sale_hf.stats(llama)

    def test_stats_of_earlier_calls_stay(self, llama):
        prefill(llama, tokens())
        llama.set_attn_implementation("sdpa")
        assert_calls(llama, LLAMA, sparse=1)
        sale_hf.reset_stats(llama)
        with pytest.raises(ValueError, match=RUNS_SDPA):
            sale_hf.stats(llama)
        llama.set_attn_implementation(sale_hf.NAME)
        assert_calls(llama, LLAMA, sparse=0)

    def test_a_part_of_a_multimodal_model(self):
        text, vision = config_of(LLAMA), transformers.SiglipVisionConfig(hidden_size=32, intermediate_size=32)
        vision.num_hidden_layers, vision.num_attention_heads, vision.image_size = 1, 2, 28
        model = transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(vision_config=vision, text_config=text)
        ).eval()
        model.set_attn_implementation({"text_config": "sdpa", "vision_config": "sdpa"})
        with pytest.raises(ValueError, match=RUNS_SDPA):
            sale_hf.configure(model.model.language_model)
        model.set_attn_implementation({"text_config": sale_hf.NAME, "vision_config": "sdpa"})
        sale_hf.configure(model.model.language_model)


class TestConfigure:
    @pytest.mark.parametrize("layers", [(), (0,), (0, 1, 2), (1, 2)])
    def test_layers_that_are_not_the_models(self, llama, layers):
        with pytest.raises(ValueError, match=r"attention layers \[0, 1\], each once, got"):
            sale_hf.configure(llama, dict.fromkeys(layers, SaleConfig()))

    def test_linear_layers_are_not_attention_layers(self):
        model = build(BY_NAME["Qwen3Next"], sale_hf.NAME)
        with pytest.raises(ValueError, match=r"attention layers \[1\], each once, got \[0, 1\]"):
            sale_hf.configure(model, dict.fromkeys((0, 1), SaleConfig()))

    @pytest.mark.parametrize("heads", [1, 2, 8])
    def test_thresholds_of_other_heads(self, llama, heads):
        with pytest.raises(ValueError, match=rf"shape \[4\], one per query head of the model, got \[{heads}\]"):
            sale_hf.configure(llama, SaleConfig(Mass(torch.full((heads,), 0.1))))

    @pytest.mark.parametrize("config", [None, 0.5, "dense", [SaleConfig(), SaleConfig()]])
    def test_types_it_does_not_know(self, llama, config):
        with pytest.raises(TypeError, match="SaleConfig, a Calibration or a mapping"):
            sale_hf.configure(llama, config)

    def test_a_mapping_to_something_else(self, llama):
        with pytest.raises(TypeError, match=r"config\[1\] must be a SaleConfig or None, got float"):
            sale_hf.configure(llama, {0: None, 1: 0.5})

    def test_a_refused_config_leaves_the_model_as_it_was(self, llama):
        before = dict(vars(sale_hf.attention_layers(llama)[0]))
        with pytest.raises(ValueError, match="shape"):
            sale_hf.configure(llama, {0: SaleConfig(), 1: SaleConfig(Mass(torch.zeros(3)))})
        assert vars(sale_hf.attention_layers(llama)[0]) == before

    def test_a_model_without_attention(self):
        with pytest.raises(ValueError, match="Linear has none"):
            sale_hf.configure(torch.nn.Linear(2, 2))

    def test_two_towers(self):
        towers = torch.nn.ModuleDict({"text": shared(LLAMA), "image": shared(BY_NAME["Bert"])})
        with pytest.raises(ValueError, match="second with index 0; pass the part that is to be sparse"):
            sale_hf.configure(towers)

    def test_an_encoder_beside_a_decoder(self):
        config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=16, num_heads=2, num_layers=1, d_ff=32)
        with pytest.raises(ValueError, match="must have"):
            sale_hf.configure(transformers.T5ForConditionalGeneration(config))

    def test_stats_of_a_model_without_it(self):
        model = build(LLAMA)
        for read in (sale_hf.stats, sale_hf.reset_stats):
            with pytest.raises(ValueError, match="must be configured first"):
                read(model)
        with (
            pytest.raises(ValueError, match="must be configured first"),
            sale_hf.observe(model, lambda call: call.query),
        ):
            pass

    def test_layers_of_a_mapping_take_their_own(self, llama):
        sale_hf.configure(llama, {0: None, 1: EVERYTHING})
        assert_close(prefill(llama, tokens()), prefill(shared(LLAMA), tokens()))
        first, second = sale_hf.stats(llama).layers
        assert (first.sparse_calls, first.dense_calls) == (0, 1)
        assert (second.sparse_calls, second.dense_calls) == (1, 0)
        assert all(path.startswith("dense") for path in first.paths)

    def test_thresholds_of_heads(self, llama):
        sale_hf.configure(llama, SaleConfig(Mass(torch.tensor([0.0, 1.0, 1.0, 0.0])), min_length=0, local_tokens=1))
        prefill(llama, tokens(length=400))
        for layer in sale_hf.stats(llama).layers:
            assert [density == 1 for density in layer.density] == [True, False, False, True]

    def test_counting_anew(self, llama):
        prefill(llama, tokens())
        sale_hf.reset_stats(llama)
        assert_calls(llama, LLAMA, sparse=0)
        assert all(layer.paths == {} for layer in sale_hf.stats(llama).layers)

    def test_configured_twice_it_counts_once(self, llama):
        sale_hf.configure(llama, EVERYTHING)
        prefill(llama, tokens())
        assert_calls(llama, LLAMA, sparse=1)


def holed():
    """A mask with padding between valid tokens, and on the left."""
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[0, :PADDED] = 0
    mask[0, 70:75] = 0
    mask[1, 30:90] = 0
    return mask


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_padding_between_tokens(name):
    family = BY_NAME[name]
    model = build(family, sale_hf.NAME)
    assert_close(prefill(model, tokens(), holed()), prefill(shared(family), tokens(), holed()), holed())
    assert_calls(model, family, sparse=1)
    assert_sparse_paths(model)


def test_a_row_of_padding_alone(llama):
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[0] = 0
    output = prefill(llama, tokens(), mask)
    assert output.isfinite().all()
    assert_close(output, prefill(shared(LLAMA), tokens(), mask), mask)


def seen_by_a_user():
    """bool ``[2, 1, S, S]``: causal, but for some columns that only the diagonal sees."""
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    seen[:, 20:90] = False
    return (seen | torch.eye(LENGTH, dtype=torch.bool)).expand(2, 1, -1, -1)


@pytest.mark.parametrize("form", ["bool", "additive"])
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GptOss"])
def test_a_mask_tensor_runs_dense_and_is_counted(name, form):
    family = BY_NAME[name]
    model = build(family, sale_hf.NAME)
    seen = seen_by_a_user()
    additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    # eager adds its mask, whatever its type
    expected = prefill_with_mask(shared(family), additive)
    assert_close(prefill_with_mask(model, seen if form == "bool" else additive), expected)
    assert_calls(model, family, sparse=0, dense=1)
    assert all("mask tensor" in path for layer in sale_hf.stats(model).layers for path in layer.paths)


@torch.no_grad()
def prefill_with_mask(model, mask):
    return model(tokens(), attention_mask=mask, use_cache=False).logits


def test_a_block_mask_of_the_users(llama):
    seen = seen_by_a_user()
    mask = create_block_mask(
        lambda b, h, q, k: (q >= k) & ~((k >= 20) & (k < 90)) | (q == k), None, None, LENGTH, LENGTH, "cpu", 64
    )
    additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    assert_close(prefill_with_mask(llama, mask), prefill_with_mask(shared(LLAMA), additive))
    assert_calls(llama, LLAMA, sparse=1)
    assert_sparse_paths(llama)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Bert"])
def test_a_model_that_nobody_configured(name):
    family = BY_NAME[name]
    model = build(family)
    model.set_attn_implementation(sale_hf.NAME)
    mask = holed().fliplr()
    for options in ({}, {"mask": mask}):
        assert_close(
            prefill(model, tokens(), **options), prefill(shared(family), tokens(), **options), options.get("mask")
        )
    with pytest.raises(ValueError, match="configured"):
        sale_hf.stats(model)


def test_the_default_config_keeps_short_prompts_dense(llama):
    sale_hf.configure(llama)
    assert_close(prefill(llama, tokens()), prefill(shared(LLAMA), tokens()))
    assert_calls(llama, LLAMA, sparse=0, dense=1)
    for layer in sale_hf.stats(llama).layers:
        assert set(layer.paths) == {f"{Ran.DENSE_SDPA.value}: no more keys than min_length"}


def test_stats_print_as_a_table_and_go_to_json(llama):
    before = json.loads(json.dumps(sale_hf.stats(llama).as_dict(), allow_nan=False))
    assert [layer["density"] for layer in before["layers"]] == [[None] * 4] * LAYERS
    prefill(llama, tokens(length=LENGTH))
    counted = sale_hf.stats(llama)
    assert len(str(counted).splitlines()) == 1 + LAYERS
    assert counted.density == 1
    assert counted.as_dict()["layers"][0]["sparse_calls"] == 1


def test_a_layer_says_how_many_heads_it_has():
    assert sale_hf.query_heads(sale_hf.attention_layers(shared(LLAMA))[0]) == 4
    with pytest.raises(ValueError, match="num_attention_heads"):
        sale_hf.query_heads(SimpleNamespace())


def test_packed_rows_with_a_padding_mask_are_not_packed_for_transformers(llama):
    positions = packed_positions((100, 60), (33, 64, 63))
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    assert_close(
        prefill(llama, tokens(), mask, position_ids=positions),
        prefill(shared(LLAMA), tokens(), mask, position_ids=positions),
    )


def test_an_older_transformers_is_named(monkeypatch):
    # What the integration sees: a process may hold transformers twice.
    monkeypatch.setattr(sale_hf.transformers, "__version__", "5.16.1")
    with pytest.raises(ImportError, match=r"needs transformers 5\.17 or later, got 5\.16\.1"):
        sale_hf.register()


def test_without_transformers_the_import_says_what_to_install():
    code = "import sys; sys.modules['transformers'] = None; import sale_flex.integrations.transformers"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'sale-flex[hf]'" in done.stderr


class TestModelMasksOnOtherDevices:
    def mask_of(self, **options):
        padding = torch.arange(96) >= torch.tensor([[40], [0]])
        return sale_hf.sale_flex_mask(batch_size=2, q_length=96, kv_length=96, attention_mask=padding, **options)

    def test_positions_move(self):
        mask = self.mask_of(mask_function=masking_utils.causal_mask_function)
        assert mask.to("cpu") is mask
        moved = mask.to("meta")
        assert moved.looks._replace(padding=None) == mask.looks._replace(padding=None)
        assert moved.looks.padding.valid.device.type == moved.options["kv_range"].device.type == "meta"

    def test_functions_do_not(self):
        packed = masking_utils.packed_sequence_mask_function(torch.zeros(2, 96, dtype=torch.int64))
        mask = self.mask_of(mask_function=packed, allow_is_causal_skip=False)
        with pytest.raises(NotImplementedError, match="from cpu to meta; keep such a model on one device"):
            mask.to("meta")
