# SPDX-License-Identifier: BSD-3-Clause
"""torch.export of a model without a cache, the first time as every other."""

import pytest
import torch
from models_harness import BY_NAME, assert_close, build, shared, tokens

import sale_flex.integrations.transformers as sale_hf
from sale_flex.mods.compiler import recognise

pytestmark = [
    pytest.mark.compiles,
    # transformers' collector of outputs, which a strict export notices.
    pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning"),
]


@pytest.fixture(autouse=True)
def no_mod_seen_before(monkeypatch):
    monkeypatch.setattr(recognise, "_memo", {})


@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
def test_the_first_export_is_as_good_as_the_second(strict):
    model = build(BY_NAME["Qwen3"], sale_hf.NAME)
    ids = tokens(batch=1)
    with torch.no_grad():
        exported = [torch.export.export(model, (ids,), {"use_cache": False}, strict=strict) for _ in range(2)]
        expected = shared(BY_NAME["Qwen3"])(ids, use_cache=False).logits
        for one in exported:
            assert_close(one.module()(ids, use_cache=False).logits, expected)
