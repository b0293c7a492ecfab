# SPDX-License-Identifier: BSD-3-Clause
"""Models and texts from disk or the hub, and what attention gets in a model's layers, by transformers' interface."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sale_flex.bench.captured import Captured
from sale_flex.call.autocast import autocast_inputs

NAME = "sale_flex_capture"
TEXT_SUFFIXES = (".md", ".py", ".rst", ".txt")
_TOKENS_A_BYTE = 11
"""At most, and but for odd text less than one: tokens are bytes or longer, and a tokenizer's Unicode normalisation can
lengthen text by this factor (NFKC in UTF-8, Unicode Standard Annex 15)."""


class Checkpoint(NamedTuple):
    """What is small of a model: all that says whether it and its texts are as wanted, before its weights are read."""

    config: PretrainedConfig
    tokenizer: Any

    @property
    def bos(self) -> int | None:
        """The token that begins a sequence, if there is one."""
        found = self.tokenizer.bos_token_id
        return self.config.get_text_config().bos_token_id if found is None else found


def find(name: str, gguf: str | None = None) -> Checkpoint:
    """A causal language model's config and tokenizer, from a folder or by its Hugging Face name.

    Args:
        name: The folder or name.
        gguf: A file of it that holds everything, if that is a GGUF file.

    Raises:
        OSError: There is none.
    """
    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise FileNotFoundError(f"model must be a folder or owner/name on the hub, and {name} is no folder")
    files = _files(gguf)
    return Checkpoint(AutoConfig.from_pretrained(name, **files), AutoTokenizer.from_pretrained(name, **files))


def load(name: str, dtype: torch.dtype, device: torch.device, gguf: str | None = None) -> tuple[PreTrainedModel, Any]:
    """A causal language model and its tokenizer, from a folder or by its Hugging Face name; `gguf` as in `find`.

    Raises:
        OSError: There is none.
    """
    tokenizer = find(name, gguf).tokenizer
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **_files(gguf))
    nn.Module.to(model, device)  # transformers' own `to` is annotated as taking a model
    return model.eval(), tokenizer


def _files(gguf: str | None) -> dict[str, str]:
    return {} if gguf is None else {"gguf_file": gguf}


def text_files(paths: Sequence[Path], option: str = "--text") -> list[Path]:
    """The files among `paths`, and the text files in the folders among them, those sorted.

    Args:
        paths: Files and folders.
        option: What they are from.

    Raises:
        FileNotFoundError: A path is not there, or there is no text file.
        ValueError: A path is something else.
    """
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{option} {path} is not there")
        if not path.is_dir() and not path.is_file():
            raise ValueError(f"{option} {path} must be a file or a folder, got a pipe or a device; write it to a file")
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        files += [file for file in inside if file == path or (file.suffix in TEXT_SUFFIXES and file.is_file())]
    if not files:
        raise FileNotFoundError(f"{option} holds no file that ends in {', '.join(TEXT_SUFFIXES)}")
    return files


def read_text(file: Path) -> str:
    """A file's text.

    Raises:
        ValueError: It is no text in UTF-8, or one with NUL characters, as binary files have.
    """
    try:
        text = file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} must be text in UTF-8, and its byte {error.start} is none ({error.reason}); convert it (iconv -t "
            "utf-8), or leave it out if it is no text"
        ) from None
    if "\0" in text:
        raise ValueError(
            f"{file} must be text, and holds a NUL character at {text.index(chr(0))}, as binary files do; leave it out"
        )
    return text


def check_bytes(files: Sequence[Path], length: int, options: tuple[str, str] = ("--text", "--length")) -> None:
    """Find out without a tokenizer that files are no text, or can not have `length` tokens.

    Args:
        files: In the order in which they are read; those that are sure to be read are looked at.
        length: In tokens.
        options: What the files and the length are from.

    Raises:
        OSError: A file can not be read.
        ValueError: A file is no text, or all of them are too short.
    """
    # The first token, and what a tokenizer may put before a file, are in no file.
    size = 0
    for file in files:
        size += len(read_text(file).encode())
        if _TOKENS_A_BYTE * size + len(files) + 1 >= length:
            return
    raise ValueError(f"{options[0]} has only {size} bytes, and {options[1]} asks for {length}; add text")


def read_tokens(
    tokenizer: Any,
    files: Sequence[Path],
    length: int,
    bos: int | None,
    options: tuple[str, str] = ("--text", "--length"),
) -> Tensor:
    """The token that begins a sequence, if there is one, and the first ones of the files' text, int64 ``[1, length]``.

    Args:
        tokenizer: Of the model.
        files: In their order.
        length: In tokens.
        bos: The first token.
        options: What the files and the length are from.

    Raises:
        ValueError: A file is no text, or all of them are too short.
    """
    tokens = [] if bos is None else [bos]
    for file in files:
        tokens += tokenizer(read_text(file), add_special_tokens=False).input_ids
        if len(tokens) >= length:
            return torch.tensor([tokens[:length]])
    raise ValueError(f"{options[0]} has only {len(tokens)} tokens, and {options[1]} asks for {length}; add text")


def check_layers(config: PretrainedConfig, layers: Collection[int]) -> None:
    """Raise ValueError, in the words of the command line, unless a model has these layers."""
    count = config.get_text_config().num_hidden_layers
    for layer in layers:
        if not 0 <= layer < count:
            raise ValueError(f"--layers must be in [0, {count}), which are the model's, got {layer}")


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
    check_layers(model.config, layers)
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
