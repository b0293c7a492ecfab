# SPDX-License-Identifier: BSD-3-Clause
"""What attention gets in the layers of a transformers model, by transformers' attention interface."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sale_flex.autocast import autocast_inputs
from sale_flex.bench.captured import Captured

NAME = "sale_flex_capture"
TEXT_SUFFIXES = (".md", ".py", ".rst", ".txt")


def load(name: str, dtype: torch.dtype, device: torch.device) -> tuple[PreTrainedModel, Any]:
    """A causal language model and its tokenizer, from a folder or by its Hugging Face name.

    Raises:
        OSError: There is none.
    """
    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise FileNotFoundError(f"model must be a folder or owner/name on the hub, and {name} is no folder")
    tokenizer = AutoTokenizer.from_pretrained(name)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    nn.Module.to(model, device)  # transformers' own `to` is annotated as taking a model
    return model.eval(), tokenizer


def text_files(paths: Sequence[Path]) -> list[Path]:
    """The files among `paths`, and the text files in the folders among them, those sorted.

    Raises:
        FileNotFoundError: A path is not there, or there is no text file.
    """
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"--text {path} is not there")
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        files += [file for file in inside if file == path or (file.suffix in TEXT_SUFFIXES and file.is_file())]
    if not files:
        raise FileNotFoundError(f"--text holds no file that ends in {', '.join(TEXT_SUFFIXES)}")
    return files


def read_tokens(tokenizer: Any, files: Sequence[Path], length: int, bos: int | None) -> Tensor:
    """The token that begins a sequence, if there is one, and the first ones of the files' text, int64 ``[1, length]``.

    Raises:
        ValueError: The text is too short.
    """
    tokens = [] if bos is None else [bos]
    for file in files:
        tokens += tokenizer(file.read_text("utf-8", errors="ignore"), add_special_tokens=False).input_ids
        if len(tokens) >= length:
            return torch.tensor([tokens[:length]])
    raise ValueError(f"--text has only {len(tokens)} tokens, and --length asks for {length}; add text")


@torch.inference_mode()
def capture(
    model: PreTrainedModel, tokens: Tensor, layers: Collection[int], device: torch.device | str = "cpu"
) -> dict[int, Captured]:
    """Run the model over the tokens, with its own attention by SDPA, and keep what some layers' attention gets.

    Args:
        model: A decoder; its attention implementation is what it was when this returns.
        tokens: int64 ``[1, S]``, on the model's device.
        layers: Which layers, the first is 0.
        device: Where their tensors go, as soon as they are there.

    Returns:
        Layer -> its tensors, in the order of the layers.

    Raises:
        ValueError: The model has no such layer.
        NotImplementedError: Such a layer's attention is no plain causal softmax of scaled products.
    """
    count = model.config.get_text_config().num_hidden_layers
    for layer in layers:
        if not 0 <= layer < count:
            raise ValueError(f"--layers must be in [0, {count}), which are the model's, got {layer}")
    found: dict[int, Captured] = {}

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        layer = module.layer_idx
        assert isinstance(layer, int)
        if layer in layers:
            _check_plain(layer, key.shape[2], options)
            scale = options.get("scaling")
            scale = query.shape[3] ** -0.5 if scale is None else float(scale)
            query, key, value = autocast_inputs(query, key, value)
            found[layer] = Captured(query.to(device), key.to(device), value.to(device), scale)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **options)

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        model.base_model(tokens, use_cache=False)
    finally:
        model.set_attn_implementation(before)
    return dict(sorted(found.items()))


def _check_plain(layer: int, length: int, options: dict[str, Any]) -> None:
    window = options.get("sliding_window")
    if window is not None and window < length:
        raise NotImplementedError(
            f"layer {layer} sees a sliding window of {window} tokens, not the whole prefix; leave it out of --layers"
        )
    for option in ("softcap", "s_aux"):
        if options.get(option) is not None:
            raise NotImplementedError(f"layer {layer} changes its scores by {option}; leave it out of --layers")
