# SPDX-License-Identifier: BSD-3-Clause
"""`calibrate` and `evaluate` on the bundled model: what is found, interrupted, resumed, and said of the loss."""

import json
from dataclasses import replace

import pytest
import torch
from config_harness import as_rule
from tokenizers import Tokenizer
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

import sale_flex.integrations.transformers as sale_hf
from sale_flex import Calibration, Mass, SaleConfig, calibrate
from sale_flex.calibration import evaluate, work
from sale_flex.calibration import model as running
from sale_flex.calibration.meter import Silent, TimedLines, make_meter
from sale_flex.calibration.texts import as_texts
from sale_flex.call.break_even import break_even_length
from sale_flex.demo.model import PACKAGED
from sale_flex.demo.prompt import held_out_texts

pytestmark = pytest.mark.usefixtures("uncompiled_attention")

CONFIG = SaleConfig(min_length=64, local_tokens=64)
TARGET = 0.1
LENGTH = 512


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(PACKAGED, dtype=torch.float32)


@pytest.fixture(scope="module")
def texts():
    """Four texts, int64 ``[1, LENGTH]``."""
    tokenizer = Tokenizer.from_file(str(PACKAGED / "tokenizer.json"))
    return [torch.tensor([tokenizer.encode(text).ids[:LENGTH]]) for text in held_out_texts()[:4]]


@pytest.fixture(scope="module")
def found(model, texts, tmp_path_factory):
    """What two texts give, with a third to transfer to, and its folder."""
    folder = tmp_path_factory.mktemp("calibration")
    options = {"config": CONFIG, "target": TARGET, "out": folder, "transfer": texts[2:3], "progress": Silent(0)}
    return calibrate(model, texts[:2], **options), folder


def same(one: Calibration, other: Calibration) -> bool:
    return one.to_dict() == other.to_dict() and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in ("thresholds", "errors", "densities")
    )


def test_every_head_keeps_to_the_target(found):
    calibration, _ = found
    assert calibration.thresholds.shape == (4, 4)
    assert calibration.layers == (0, 1, 2, 3)
    assert (calibration.errors <= TARGET).all()
    assert (calibration.thresholds > 0).all()
    assert (calibration.densities < 1).any()
    assert calibration.unused == ()
    assert calibration.on.rise != 0


def test_the_folder_holds_what_was_found(found):
    calibration, folder = found
    assert same(calibration, Calibration.from_pretrained(folder))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "thresholds.safetensors"]


def test_a_threshold_is_the_smallest_of_the_texts(model, texts, found):
    calibration, _ = found
    alone = [calibrate(model, [text], config=CONFIG, target=TARGET, progress=Silent(0)) for text in texts[:2]]
    smallest = torch.minimum(alone[0].thresholds, alone[1].thresholds)
    assert (calibration.thresholds <= smallest).all()
    # Lower than that only where an error shrinks as the threshold grows, which no head's does here.
    assert torch.equal(calibration.thresholds, smallest)
    assert not torch.equal(alone[0].thresholds, alone[1].thresholds)


def test_errors_densities_and_losses_are_those_of_an_evaluation(model, texts, found):
    calibration, _ = found
    for on, batches in ((calibration.on, texts[:2]), (calibration.transfer, texts[2:3])):
        again = evaluate(model, calibration, batches, progress=Silent(0))
        assert torch.equal(on.errors, again.errors)
        assert torch.equal(on.densities, again.densities)
        assert on.texts == again.texts


def test_losses_are_the_models_own(model, texts, found):
    calibration, _ = found
    expected = []
    with torch.no_grad():
        for text in texts[:2]:
            dense = model(text, labels=text).loss.item()
            sale_hf.register()
            model.set_attn_implementation("sale_flex")
            sale_hf.configure(model, calibration)
            expected.append((dense, model(text, labels=text).loss.item()))
            sale_hf.configure(model, SaleConfig())
            model.set_attn_implementation("sdpa")
    for text, (dense, sparse) in zip(calibration.on.texts, expected):
        # Means of the same 511 float32 losses, which are below 16: half a unit in the last place each.
        assert abs(text.loss_dense - dense) < 16 * 2**-20
        assert abs(text.loss_sparse - sparse) < 16 * 2**-20
        assert text.targets == LENGTH - 1


def test_logits_are_taken_in_slices_and_are_the_models_own(monkeypatch):
    config = Gemma2Config(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=32, final_logit_softcapping=0.5,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    ids = torch.randint(97, (2, 50), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    (text,) = as_texts([{"input_ids": ids, "attention_mask": mask}])
    with torch.no_grad():
        output = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        labels = ids.masked_fill(mask == 0, -100)
        labels[1, 20] = -100  # what comes before it is padding
        expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss.item()
    monkeypatch.setattr(running, "_POSITIONS", 13)
    loss, targets = running.mean_loss(model, output, text)
    assert targets == 49 + 29
    # Logits are at most 0.5, so losses are below 6: float32 sums of 78 of them.
    assert abs(loss - expected) < 78 * 6 * 2**-24
    assert "forward" not in model.base_model.__dict__


class Interrupting(Silent):
    """Counts steps, and interrupts when one more than `after` begins."""

    def __init__(self, after: int) -> None:
        super().__init__(0)
        self.after, self.begun = after, 0

    def begin(self, setting: str) -> None:
        if self.begun == self.after:
            raise KeyboardInterrupt
        self.begun += 1


def test_interrupted_again_and_again_it_finds_the_same(model, texts, found, tmp_path):
    options = {"config": CONFIG, "target": TARGET, "out": tmp_path, "transfer": texts[2:3]}
    steps = []
    for tries in range(10):
        meter = Interrupting(after=4)
        steps.append(meter)
        try:
            calibration = calibrate(model, texts[:2], **options, resume=tries > 0, progress=meter)
            break
        except KeyboardInterrupt:
            assert (tmp_path / "progress.json").exists() or (tmp_path / "progress-transfer.json").exists()
    assert tries > 3
    assert same(calibration, found[0])
    # A step that began was interrupted, and is the only one to be done again.
    assert sum(meter.begun for meter in steps) == 2 * (4 + 4 + 1) + (4 + 1)
    for name in ("config.json", "thresholds.safetensors"):
        assert (tmp_path / name).read_bytes() == (found[1] / name).read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_finished_one_is_not_run_again(model, texts, found):
    calibration, folder = found
    never = Interrupting(after=0)
    options = {"config": CONFIG, "target": TARGET, "out": folder, "resume": True, "progress": never}
    assert same(calibrate(model, texts[:2], **options), calibration)
    assert same(calibrate(model, texts[:2], transfer=texts[2:3], **options), calibration)
    with pytest.raises(ValueError, match=r"target is 0\.1 there and 0\.2 here"):
        calibrate(model, texts[:2], **options | {"target": 0.2})


@pytest.fixture(scope="module")
def interrupted(model, texts, tmp_path_factory):
    """A folder in which a calibration stopped after two layers."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, texts[:2], config=CONFIG, target=TARGET, out=folder, progress=Interrupting(after=2))
    return folder


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"target": 0.2}, r"target is 0\.1 there and 0\.2 here"),
        ({"error": "absolute"}, "error is 'relative' there and 'absolute' here"),
        ({"search": "halving"}, "search is 'bisection' there and 'halving' here"),
        ({"config": CONFIG.with_options(bits=4)}, r"config\.rule\.bits is 8 there and 4 here"),
        ({"resume": False}, "holds an interrupted calibration: go on with it by resume=True"),
    ],
)
def test_other_settings_are_not_gone_on_with(model, texts, interrupted, change, match):
    before = (interrupted / "progress.json").read_bytes()
    options = {"config": CONFIG, "target": TARGET, "out": interrupted, "resume": True, "progress": Silent(0)}
    with pytest.raises(ValueError, match=match):
        calibrate(model, texts[:2], **options | change)
    assert (interrupted / "progress.json").read_bytes() == before


def test_other_texts_are_not_gone_on_with(model, texts, interrupted):
    options = {"config": CONFIG, "target": TARGET, "out": interrupted, "resume": True, "progress": Silent(0)}
    with pytest.raises(ValueError, match="texts 1 are others"):
        calibrate(model, [texts[0], texts[3]], **options)
    with pytest.raises(ValueError, match="texts are 2 there and 1 here"):
        calibrate(model, texts[:1], **options)


def test_an_error_above_the_target_lowers_the_threshold(model, texts, monkeypatch):
    searched = calibrate(model, texts[:1], config=CONFIG, target=TARGET, progress=Silent(0))
    monkeypatch.setattr(work, "find_thresholds", lambda call, goal: torch.ones(call.heads))
    lowered = calibrate(model, texts[:1], config=CONFIG, target=TARGET, progress=Silent(0))
    assert (lowered.errors <= TARGET).all()
    assert torch.equal(lowered.thresholds, searched.thresholds)


def test_what_one_text_lowers_is_measured_again_on_the_others(model, texts, monkeypatch):
    monkeypatch.setattr(work, "find_thresholds", lambda call, goal: torch.ones(call.heads))
    for batches in (texts[:2], texts[1::-1]):  # whichever of them is the one that lowers
        lowered = calibrate(model, batches, config=CONFIG, target=TARGET, progress=Silent(0))
        again = evaluate(model, lowered, batches, progress=Silent(0))
        assert torch.equal(again.errors, lowered.errors)
        assert torch.equal(again.densities, lowered.densities)


def test_texts_that_are_dense_by_length_leave_layers_uncalibrated(model, texts):
    config = replace(CONFIG, min_length=LENGTH)
    calibration = calibrate(model, texts[:1], config=config, progress=Silent(0))
    assert calibration.unused == calibration.layers
    assert (calibration.thresholds == 0).all()
    assert (calibration.densities == 1).all()
    assert calibration.dense_heads == 0
    # A text that is long enough decides alone.
    short, long = texts[0][:, :100], texts[1]
    config = replace(CONFIG, min_length=128)
    both, alone = (
        calibrate(model, batches, config=config, target=TARGET, progress=Silent(0))
        for batches in ([short, long], [long])
    )
    assert torch.equal(both.thresholds, alone.thresholds)
    assert both.unused == ()


def test_min_length_is_stored_as_it_is_on_the_device(model, texts, tmp_path):
    options = {"config": SaleConfig(min_length=None), "out": tmp_path, "progress": Silent(0)}
    calibration = calibrate(model, [texts[0][:, :64]], **options)
    stored = json.loads((tmp_path / "config.json").read_text())["config"]["min_length"]
    assert type(stored) is int
    assert stored == calibration.config.min_length == break_even_length(model.device, model.config.head_dim)
    assert same(calibrate(model, [texts[0][:, :64]], **options, resume=True), calibration)


def test_padded_batches(model, texts):
    ids = torch.cat(texts[:2])
    mask = torch.ones_like(ids)
    mask[1, :100] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    calibration = calibrate(model, [batch], config=CONFIG, target=TARGET, progress=Silent(0))
    assert (calibration.errors <= TARGET).all()
    assert (calibration.thresholds > 0).all()
    (text,) = calibration.on.texts
    assert (text.shape, text.targets) == ((2, LENGTH), LENGTH - 1 + LENGTH - 101)


def test_the_model_is_left_as_it_was(model, texts):
    mine = SaleConfig(Mass(0.125), min_length=99)
    configured(model, mine)
    model.train()
    try:
        calibrate(model, [texts[0][:, :64]], config=CONFIG, progress=Silent(0))
        assert model.training
        assert model.config._attn_implementation == "sdpa"
        states = [module._sale_flex for module in sale_hf.attention_layers(model).values()]
        assert all(state.config == mine and state.observer is None for state in states)
    finally:
        model.eval()
        configured(model, SaleConfig())


def configured(model, config):
    """Configure a model that goes on with sdpa."""
    sale_hf.register()
    model.set_attn_implementation("sale_flex")
    sale_hf.configure(model, config)
    model.set_attn_implementation("sdpa")


SMALL = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "max_position_embeddings": 4096,
}  # fmt: skip


def sinks_and_windows():
    """Layers 0 and 1, the first with a window so narrow that nothing is left to choose; both with sink logits."""
    kinds = {"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"]}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    return GptOssForCausalLM(GptOssConfig(**SMALL, **kinds, **experts, **rope, num_hidden_layers=2)), (0, 1), (0,)


def linear_layers():
    """Attention in the last of four layers."""
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
    experts["shared_expert_intermediate_size"] = 32
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
    linear |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    return Qwen3NextForCausalLM(Qwen3NextConfig(**SMALL, **experts, **linear, num_hidden_layers=4)), (3,), ()


@pytest.mark.parametrize("make", [sinks_and_windows, linear_layers])
def test_other_attention(make):
    torch.manual_seed(0)
    model, layers, unused = make()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.15)
    calibration = calibrate(
        model,
        [torch.randint(97, (1, 600))],
        config=replace(CONFIG, local_tokens=32),
        target=TARGET,
        progress=Silent(0),
    )
    assert (calibration.layers, calibration.unused) == (layers, unused)
    assert (calibration.errors <= TARGET).all()
    for row, layer in enumerate(layers):
        assert bool((calibration.densities[row] < 1).all()) == (layer not in unused)
        assert bool((calibration.thresholds[row] > 0).all()) == (layer not in unused)


def test_a_model_of_another_shape_is_refused(found, texts):
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    other = LlamaForCausalLM(config)
    with pytest.raises(ValueError, match=r"layers 0-3 with 4 query heads .* has layers 0-1 with 2"):
        evaluate(other, found[0], texts[:1])
    with pytest.raises(TypeError, match="must be a causal language model"):
        calibrate(AutoModel.from_config(config), texts[:1])


@pytest.mark.parametrize(
    ("batches", "error", "match"),
    [
        ([], ValueError, "batches must hold one batch or more"),
        (torch.zeros(1, 8).long(), TypeError, "batches must be an iterable of batches, got a single one"),
        ([torch.zeros(8).long()], ValueError, r"batches\[0\] must .* \[batch, tokens\].*unsqueeze"),
        ([torch.zeros(1, 8)], ValueError, r"batches\[0\] must hold integers"),
        ([[1, 2, 3]], TypeError, r"batches\[0\] must be a tensor \[batch, tokens\], got list"),
        ([{"input_ids": torch.zeros(1, 8).long(), "labels": 1}], ValueError, r"got \['input_ids', 'labels'\]"),
        (
            [{"input_ids": torch.zeros(1, 8).long(), "attention_mask": torch.ones(1, 7).long()}],
            ValueError,
            r"must have its input_ids' shape \[1, 8\], got \[1, 7\]",
        ),
        (
            [{"input_ids": torch.zeros(1, 8).long(), "attention_mask": torch.zeros(1, 8).long()}],
            ValueError,
            "must have two tokens that are no padding",
        ),
    ],
)
def test_batches_that_are_none(batches, error, match):
    with pytest.raises(error, match=match):
        calibrate(None, batches)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"target": -1.0}, ValueError, "target must be above 0"),
        ({"config": 0.01}, TypeError, "config must be a sale_flex.SaleConfig, got float"),
        ({"resume": True}, ValueError, "resume needs the folder"),
        ({"transfer": []}, ValueError, "transfer must hold one batch or more"),
    ],
)
def test_arguments_that_are_wrong(options, error, match, texts):
    with pytest.raises(error, match=match):
        calibrate(None, texts[:1], **options)


def test_texts_differ_by_tokens_shape_and_mask():
    ids = torch.arange(8)[None]
    batches = [ids, ids.view(2, 4), ids.flip(1), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    assert len({text.sha256 for text in as_texts(batches)}) == 4
    assert as_texts([ids.int()])[0].sha256 == as_texts([ids])[0].sha256


def test_lines_say_what_is_left(capsys):
    with TimedLines(2) as meter:
        meter.begin("one")
        meter.finish("")
        meter.begin("two")
        meter.finish("")
    first, second = capsys.readouterr().err.splitlines()
    assert first == "1 of 2: one"
    assert second.startswith("2 of 2: two, 0 s left")
    assert type(make_meter(2)) is TimedLines  # nobody looks


def test_a_terminal_gets_a_bar_with_the_time_left(monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with make_meter(2) as meter:
        meter.begin("one")
        meter.finish("")
    assert "TimeRemainingColumn" in {type(column).__name__ for column in meter._bar.columns}


@pytest.mark.gpu
@pytest.mark.parametrize("metric", ["mass", "relative"])
def test_on_a_gpu(metric, texts):
    model = AutoModelForCausalLM.from_pretrained(PACKAGED, dtype=torch.bfloat16).to("cuda")
    config = as_rule(CONFIG, metric)
    calibration = calibrate(model, texts[:2], config=config, target=TARGET, progress=Silent(0))
    assert (calibration.errors <= TARGET).all()
    assert (calibration.densities < 1).any()
    assert json.loads(json.dumps(calibration.to_dict()))["device"] == "cuda"
