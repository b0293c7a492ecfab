# SPDX-License-Identifier: BSD-3-Clause
"""Calibrations belong to weights: what tells them apart, what does not, and what is said of others."""

import copy
import itertools
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import sale_flex.integrations.transformers as sale_hf
from sale_flex import Calibration, Mass, SaleConfig, calibrate
from sale_flex.calibration import Evaluation, Text, evaluate, weights
from sale_flex.calibration.goal import Goal
from sale_flex.calibration.meter import Silent
from sale_flex.calibration.weights import differing, fingerprint

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 1024,
}  # fmt: skip


def llama(seed: int = 0, **fields) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SMALL | fields)).eval()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return llama()


def calibration_of(model: LlamaForCausalLM) -> Calibration:
    table = torch.full((2, 2), 0.25)
    on = Evaluation(table, table, (Text("ab" * 32, (1, 64), 63, 1.0, 1.0),))
    hashes = fingerprint(model)
    return Calibration(SaleConfig(), table, (0, 1), Goal(0.05), on, "a/model", weights=hashes)


def sparse(model: LlamaForCausalLM) -> LlamaForCausalLM:
    sale_hf.register()
    model = copy.deepcopy(model)
    model.set_attn_implementation(sale_hf.NAME)
    return model


NAMES = [name for name, _ in llama().named_parameters()]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("at", [0, -1])
def test_an_element_of_any_parameter_tells_models_apart(model, name, at):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter(name).view(-1)[at] += 0.5
    assert differing(fingerprint(model), fingerprint(other)) == (
        ["head"] if name.startswith("lm_head") else ["decoder"]
    )


def test_a_scale_tells_models_apart(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight *= 1.01
    assert differing(fingerprint(model), fingerprint(other)) == ["decoder"]


def test_names_and_shapes_tell_models_apart(model):
    other = copy.deepcopy(model)
    projection = other.model.layers[0].self_attn.o_proj
    projection.weight = torch.nn.Parameter(projection.weight.view(32, 128))
    assert differing(fingerprint(model), fingerprint(other)) == ["decoder"]
    other = copy.deepcopy(model)
    other.model.layers[0].mlp.register_buffer("scale", torch.ones(()))
    assert differing(fingerprint(model), fingerprint(other)) == ["decoder"]
    other.model.layers[0].mlp._non_persistent_buffers_set.add("scale")  # in no checkpoint
    assert differing(fingerprint(model), fingerprint(other)) == []


@pytest.mark.parametrize("stored", DTYPES)
def test_a_checkpoint_is_the_same_in_every_dtype(tmp_path, stored):
    llama(1).to(stored).save_pretrained(tmp_path)
    found = {
        dtype: fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype))
        for dtype in (*DTYPES, torch.float64)
    }
    for one, other in itertools.permutations(found, 2):
        narrowed_twice = stored == torch.float32 and {one, other} == {torch.bfloat16, torch.float16}
        assert bool(differing(found[one], found[other])) == narrowed_twice


def test_a_part_of_a_model_is_compared_as_far_as_it_goes(model):
    assert list(fingerprint(model.model)) == ["decoder"]
    assert differing(fingerprint(model), fingerprint(model.model)) == []
    assert differing(fingerprint(llama(1).model), fingerprint(model)) == ["decoder"]
    assert fingerprint(model.model.layers) is None  # without the model around them


def test_what_is_done_with_a_model_changes_nothing(model):
    before = fingerprint(model)
    changed = sparse(model)
    sale_hf.configure(changed, SaleConfig())
    changed.train()
    changed(torch.arange(64)[None])
    changed.requires_grad_(False)
    assert fingerprint(changed) == before
    assert fingerprint(torch.compile(changed)) == before


def test_tied_weights(tmp_path):
    tied = llama(tie_word_embeddings=True)
    tied.save_pretrained(tmp_path)
    assert fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path)) == fingerprint(tied)
    with torch.no_grad():
        tied.lm_head.weight[0, 0] += 1
    assert differing(fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path)), fingerprint(tied)) == [
        "decoder",
        "head",
    ]


def test_how_a_tensor_lies_in_memory_is_no_matter(model):
    other = copy.deepcopy(model)
    projection = other.model.layers[0].self_attn.q_proj
    projection.weight = torch.nn.Parameter(projection.weight.detach().t().contiguous().t())
    assert fingerprint(other) == fingerprint(model)


def test_of_large_tensors_evenly_spaced_elements_are_taken(monkeypatch):
    monkeypatch.setattr(weights, "_SAMPLE", 5)
    assert weights._sample(torch.arange(101).view(101, 1)).tolist() == [0, 25, 50, 75, 100]
    turned = torch.arange(100).view(2, 2, 25).transpose(0, 2)
    assert torch.equal(weights._sample(turned), turned.flatten()[[0, 24, 49, 74, 99]])
    assert weights._sample(torch.arange(5)).tolist() == [0, 1, 2, 3, 4]


def test_weights_that_are_not_here_are_not_compared(model):
    whole = fingerprint(model)
    offloaded = copy.deepcopy(model)
    offloaded.model.layers[1].to("meta")
    sharded = copy.deepcopy(model)
    sharded._tp_size = 2
    for other in (offloaded, sharded):
        assert fingerprint(other) is None
        assert differing(whole, fingerprint(other)) == differing(fingerprint(other), whole) == []


def test_configure_warns_of_other_weights(model):
    own = calibration_of(model)
    with pytest.warns(UserWarning, match=r"of a/model with weights other than this model's: decoder and head differ"):
        sale_hf.configure(sparse(llama(1)), own)
    trained = sparse(model)
    with torch.no_grad():
        trained.model.embed_tokens.weight[5] += 1
    with pytest.warns(UserWarning, match=r"decoder differ\. .* calibrate this model") as caught:
        sale_hf.configure(trained, own)
    assert caught[0].filename == __file__
    states = [module._sale_flex for module in sale_hf.attention_layers(trained).values()]
    # It is configured all the same.
    assert all(state.config.rule.threshold.tolist() == [0.25, 0.25] for state in states)


def test_configure_says_nothing_of_the_same_weights(model):
    own = calibration_of(model)
    unknown = calibration_of(model)
    object.__setattr__(unknown, "weights", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in DTYPES[:2]:
            sale_hf.configure(sparse(model).to(dtype), own)
        sale_hf.configure(sparse(model).model, own)
        sale_hf.configure(sparse(llama(1)), unknown)


def test_configure_takes_what_knows_of_layers_alone(model):
    class Layers:
        def check_fits(self, layers):
            assert layers == {0: 2, 1: 2}

        def layer_config(self, layer):
            return SaleConfig(Mass(0.125))

    sale_hf.configure(sparse(model), Layers())


def test_evaluate_warns_of_other_weights(model):
    with pytest.warns(UserWarning, match="weights other than this model's"):
        evaluate(llama(1), calibration_of(model), [torch.arange(64)[None]], progress=Silent(0))


class Stop(Silent):
    """Interrupts when the second step begins."""

    begun = 0

    def begin(self, setting: str) -> None:
        self.begun += 1
        if self.begun == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("finished", [False, True])
def test_resume_refuses_other_weights(model, tmp_path, finished):
    texts = [torch.arange(90)[None]]
    options = {"config": SaleConfig(min_length=0, local_tokens=1), "out": tmp_path}
    if finished:
        first = calibrate(model, texts, progress=Silent(0), **options)
    else:
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, texts, progress=Stop(0), **options)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight[0] += 1
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="the model's weights are others than those there"):
        calibrate(other, texts, progress=Silent(0), resume=True, **options)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    again = calibrate(model, texts, progress=Silent(0), resume=True, **options)
    assert again.weights == fingerprint(model)
    assert not finished or again.to_dict() == first.to_dict()
    assert Calibration.from_pretrained(tmp_path).weights == fingerprint(model)


@pytest.mark.parametrize("name", ["config.json", "progress.json", "progress-transfer.json"])
def test_a_folder_that_is_in_use_is_left_alone(model, tmp_path: Path, name):
    (tmp_path / name).write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"resume=True \(--resume\)"):
        calibrate(model, [torch.arange(90)[None]], out=tmp_path, progress=Silent(0))
    assert (tmp_path / name).read_text() == '{"model_type": "llama"}'
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.gpu
def test_the_device_is_no_matter(model):
    assert fingerprint(copy.deepcopy(model).to("cuda")) == fingerprint(model)
    for dtype in DTYPES:
        narrow = copy.deepcopy(model).to(dtype)
        assert fingerprint(copy.deepcopy(narrow).to("cuda")) == fingerprint(narrow)
