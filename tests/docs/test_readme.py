# SPDX-License-Identifier: BSD-3-Clause
"""The code of README.md and of docs/ runs as it stands, but for the device and the length."""

import re
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import sale_flex
import sale_flex.integrations.transformers as sale_hf
from sale_flex import Calibration, SaleConfig
from sale_flex.calibration.evaluation import Evaluation, Text
from sale_flex.calibration.goal import Goal
from sale_flex.demo.model import PACKAGED
from sale_flex.testing import Shape, structured_inputs

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def code_of(page: str) -> list[str]:
    """The Python of a page, block by block."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)


def test_the_readme_is_read_in_a_minute_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 150
    for page in (ROOT / "README.md", ROOT / "DESIGN.md", ROOT / "CONTRIBUTING.md"):
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8")):
            assert link.startswith("https://") or (ROOT / link).exists(), link


def test_the_guide_begins_with_the_readmes_code():
    assert code_of("docs/guide.md")[0] == code_of("README.md")[0]


def test_the_code_runs_and_its_two_ways_agree():
    code = code_of("README.md")[0]
    code = code.replace('"cuda"', '"cpu"').replace("16384", "2048").replace(" 32,", " 4,").replace(" 8,", " 2,")
    names: dict = {}
    code = code.replace("mask =", "first = out\nmask =").replace("out, aux =", "_, aux =")
    exec(code, names)
    assert names["aux"].stats.describe() == "flex_attention after 1024 dense rows"
    # One computation with two mask_mods that hide the same elements, but for the rows that SDPA computes.
    first, out = names["first"], names["out"]
    assert first[:, :, 1024:].equal(out[:, :, 1024:])
    torch.testing.assert_close(first, out, rtol=0.02, atol=0.02)  # bfloat16, and sums in another order


def test_the_calls_with_mods_run():
    (code,) = code_of("docs/masks.md")
    code = code.replace('"cuda"', '"cpu"').replace("alibi(32", "alibi(4").replace("(256, 512)", "(16, 32)")
    q, k, v = structured_inputs(Shape(512, 512, heads=4, kv_heads=2, head_dim=32), 0)
    names = {
        "sale_flex": sale_flex,
        "cfg": sale_flex.SaleConfig(min_length=0),
        "q": q,
        "k": k,
        "v": v,
        "ids": torch.arange(512) // 200,
        "my_score_mod": lambda score, b, h, q_idx, kv_idx: score * 2,
        "my_block_mask": create_block_mask(sale_flex.mods.causal(), None, None, 512, 512, device="cpu"),
    }
    exec(code, names)
    assert names["out"].shape == q.shape
    assert names["mask"].shape == (1, 4, 512, 512)


@pytest.mark.parametrize("page", ["README.md", "docs/models.md"])
def test_a_model_generates_as_shown(page, tmp_path):
    code = code_of(page)[-1]
    sale_hf.register()
    model = AutoModelForCausalLM.from_pretrained(PACKAGED, attn_implementation="sale_flex")
    layers = sale_hf.attention_layers(model)
    nothing = torch.zeros(len(layers), 4)
    on = Evaluation(nothing, nothing + 1, (Text("0" * 64, (1, 8), 7, 1.0, 1.0),))
    Calibration(SaleConfig(), nothing + 0.01, tuple(layers), Goal(0.05), on, "the demo's").save_pretrained(tmp_path)
    # A compiled model is the matter of integrations/test_inductor.py.
    code = code.replace(".cuda()", "").replace("model.compile(fullgraph=True)", "").replace("bfloat16", "float32")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(PACKAGED / "tokenizer.json"), pad_token="<s>")
    tokenizer.padding_side = "left"
    inputs = tokenizer(["import os\n" * 20, "import sys\n"], padding=True, return_tensors="pt")
    names = {
        "inputs": inputs,
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "path": PACKAGED,
        "sale_flex": sale_flex,
        "texts": ["import os\n" * 20, "import sys\n"],
        "tokenizer": tokenizer,
        "torch": torch,
    }
    exec(code.replace("calibration/", str(tmp_path)).replace("max_new_tokens=64", "max_new_tokens=3"), names)
    assert names["out"].shape[0] == 2
    assert [one.decode_calls for one in sale_hf.stats(names["model"]).layers] == [2] * len(layers)


def test_ci_runs_the_test_command_it_promises():
    commands = re.findall(r"^pip install .*?(?=  #|$)", README, re.MULTILINE)
    assert [command.split(" && ")[1].strip() for command in commands] == ["sale-flex demo", "pytest"]
    assert commands[1].strip() in (ROOT / ".ci/run").read_text("utf-8")
