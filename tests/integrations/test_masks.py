# SPDX-License-Identifier: BSD-3-Clause
"""Masks of the integration: made when a layer asks, and no tensors to whoever takes them for some."""

import copy
from types import SimpleNamespace

import causal_lms
import pytest
import torch
from models_harness import BY_NAME, EVERYTHING, LENGTH, assert_close, build, padding_mask, prefill, tokens
from torch.nn.attention.flex_attention import BlockMask
from transformers import masking_utils

import sale_flex.integrations.transformers as sale_hf
from sale_flex.integrations.transformers import masks

WINDOW_OF_NONE = "window must be an int of at least 1, got"


class TestMasksThatNoLayerTakes:
    @pytest.mark.parametrize("length", [LENGTH, 8])
    @pytest.mark.parametrize("window", [0, -3])
    def test_a_window_of_no_token(self, window, length):
        options = {"use_sliding_window": False, "layer_types": ["full_attention"] * 2}
        dense, model = (build(BY_NAME["Qwen2"], name, **options) for name in ("eager", sale_hf.NAME))
        model.config.sliding_window, model.model.has_sliding_layers = window, True
        assert_close(prefill(model, tokens(length=length)), prefill(dense, tokens(length=length)))

    def test_qwen2_moe_as_its_config_has_it(self):
        model = causal_lms.build("Qwen2MoeForCausalLM")
        assert model.config.sliding_window == 0 or model.config.sliding_window is None
        expected = prefill(model, tokens())
        model.set_attn_implementation(sale_hf.NAME)
        sale_hf.configure(model, EVERYTHING)
        assert_close(prefill(model, tokens()), expected)

    @pytest.mark.parametrize("length", [LENGTH, 8])
    @pytest.mark.parametrize("window", [0, -3])
    def test_a_layer_that_takes_it_raises(self, window, length):
        model = build(BY_NAME["Mistral"], sale_hf.NAME)
        model.config.sliding_window = window
        with pytest.raises(ValueError, match=f"{WINDOW_OF_NONE} {window}"):
            prefill(model, tokens(length=length))

    @pytest.mark.parametrize("length", [LENGTH, 8])
    def test_chunks_of_no_token(self, length):
        config = SimpleNamespace(attention_chunk_size=0)
        function = masking_utils.chunked_causal_mask_function(0, torch.zeros(2, dtype=torch.int64))
        mask = sale_hf.sale_flex_mask(2, length, length, mask_function=function, local_size=0, config=config)
        with pytest.raises(ValueError, match="attention_chunk_size must be an int of at least 1, got 0"):
            _ = mask.options

    def test_a_function_that_raises(self):
        def function(*_):
            raise AssertionError

        sale_hf.sale_flex_mask(2, LENGTH, LENGTH, mask_function=function, allow_is_causal_skip=False)

    def test_options_are_made_once_when_asked_for(self, monkeypatch):
        made = []
        window = masks.mods.sliding_window
        monkeypatch.setattr(masks.mods, "sliding_window", lambda *args: made.append(args) or window(*args))
        model = build(BY_NAME["Mistral"], sale_hf.NAME)
        prefill(model, tokens())
        assert len(made) == 1
        config = SimpleNamespace(sliding_window=50)
        sliding = masking_utils.sliding_window_causal_mask_function(50)
        mask = sale_hf.sale_flex_mask(2, LENGTH, LENGTH, mask_function=sliding, local_size=50, config=config)
        assert len(made) == 1
        assert mask.options is mask.options
        assert len(made) == 2


class TestMasksTakenForTensors:
    x = torch.zeros(2, 1, LENGTH, LENGTH)

    def mask(self):
        return sale_hf.sale_flex_mask(2, LENGTH, LENGTH, attention_mask=padding_mask("left").bool())

    @pytest.mark.parametrize(
        "use",
        {
            "dtype": lambda m, x: m.dtype,
            "ndim": lambda m, x: m.ndim,
            "dim": lambda m, x: m.dim(),
            "masked_fill": lambda m, x: m.masked_fill(x == 0, 0.0),
            "masked_fill of another": lambda m, x: x.masked_fill(m, 0.0),
            "where": lambda m, x: torch.where(m, x, x),
            "pad": lambda m, x: torch.nn.functional.pad(m, (0, 1)),
            "cat": lambda m, x: torch.cat([m, x], -1),
            "+": lambda m, x: x + m,
            "+ from the left": lambda m, x: m + x,
            "&": lambda m, x: m & x.bool(),
            "~": lambda m, x: ~m,
            "-": lambda m, x: 1.0 - m,
            "*": lambda m, x: m * x,
            "@": lambda m, x: m @ x,
            "<": lambda m, x: m < 0,
            "==": lambda m, x: m == 0,
            "!=": lambda m, x: m != 0,
            "slice": lambda m, x: m[:, :, :, :8],
            "as an index": lambda m, x: x[m],
            "list": lambda m, x: list(m),
            "to a dtype": lambda m, x: m.to(torch.float16),
            "to a dtype by name": lambda m, x: m.to(dtype=torch.float16),
            "to another tensor's": lambda m, x: m.to(x),
            "to_dense": lambda m, x: m.to_dense(),
            "sdpa": lambda m, x: torch.nn.functional.scaled_dot_product_attention(x, x, x, m),
        }.items(),
        ids=lambda use: use[0],
    )
    def test_a_sentence_says_so(self, use):
        with pytest.raises((TypeError, AttributeError), match=r"has no elements, but the model uses it as a tensor"):
            use[1](self.mask(), self.x)

    def test_what_transformers_does_with_masks_works(self):
        mask = self.mask()
        assert isinstance(mask, BlockMask)
        assert tuple(mask.shape) == (1, 1, LENGTH, LENGTH)
        assert mask.contiguous() is mask.to("cpu") is mask.to(device="cpu", non_blocking=True) is mask
        assert mask == mask
        assert mask is not None
        assert mask in [None, mask]
        assert not hasattr(mask, "dtype")
        assert "padding" in repr(mask)
        assert copy.copy(mask).looks == mask.looks
