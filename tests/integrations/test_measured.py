# SPDX-License-Identifier: BSD-3-Clause
"""What `configure` says of a model's family: where it was measured, and that moments may not be safe on it."""

import logging
import warnings

import pytest
import torch
from models_harness import BY_NAME, build

import sale_flex.integrations.transformers as sale_hf
from sale_flex import Mass, Relative, SaleConfig
from sale_flex.integrations.transformers import measured

pytestmark = pytest.mark.usefixtures("uncompiled_attention")


def model_of(name: str) -> torch.nn.Module:
    """A configured model, of whose family nothing was said yet."""
    model = build(BY_NAME[name], sale_hf.NAME)
    measured._log_once.cache_clear()
    return model


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == measured.__name__]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Llama", "was measured on models of type 'llama': house-lm (24 M parameters, 32K tokens) and SmolLM2-135M"),
        ("Gemma3", "was measured on models of type 'gemma3_text': Gemma 3 270M (32K tokens)"),
        ("Qwen3", "was never measured on models of type 'qwen3' (it was on llama, gemma3_text): compare the loss"),
    ],
)
def test_it_is_logged_once_where_a_family_was_measured(name, words, caplog):
    model = model_of(name)
    with caplog.at_level(logging.INFO, measured.__name__):
        sale_hf.configure(model)
        sale_hf.configure(model, SaleConfig(Mass(0.01)))
    (message,) = said(caplog)
    assert words in message


def test_moments_are_warned_of_where_they_are_not_known_to_be_safe():
    with pytest.warns(UserWarning, match=r"type 'gemma3_text': it raises the loss of Gemma 3 270M by 0\.058"):
        sale_hf.configure(model_of("Gemma3"), SaleConfig(Mass.fast()))
    with pytest.warns(UserWarning, match=r"type 'qwen3': it was not measured on them.*the default, Mass\(\)"):
        sale_hf.configure(model_of("Qwen3"), SaleConfig(Mass.fast()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sale_hf.configure(model_of("Llama"), SaleConfig(Mass.fast()))
        sale_hf.configure(model_of("Gemma3"), SaleConfig(Relative()))


def test_a_part_without_a_config_is_of_no_family(caplog):
    part = torch.nn.Module()
    with caplog.at_level(logging.INFO, measured.__name__):
        measured.say_measured(part, [SaleConfig(Mass.fast())])
    assert said(caplog) == []
