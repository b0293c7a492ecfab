# SPDX-License-Identifier: BSD-3-Clause
"""Running a transformers model under an observer of its attention calls, and its loss on what comes out."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sale_flex.calibration.texts import Tokens
from sale_flex.config import SaleConfig

Observer = Callable[[Any], Tensor]
"""From an ``AttentionCall`` to its output."""

_POSITIONS = 2048
"""Whose logits there are at once: those of a long text over a large vocabulary are many GB."""


@contextmanager
def prepared(model: Any) -> Iterator[dict[int, int]]:
    """Let a model run sale_flex's attention, in evaluation mode, and leave it as it was.

    Yields:
        ``layer_idx`` -> query heads of every attention layer, ascending.

    Raises:
        NotImplementedError: Layers differ in their number of heads.
        TypeError: The model has no output head.
    """
    from sale_flex.integrations import transformers as sale_hf
    from sale_flex.integrations.transformers.layers import state_of

    if getattr(model, "base_model", model) is model or model.get_output_embeddings() is None:
        raise TypeError(
            f"model must be a causal language model of transformers with its output head, got {type(model).__name__}; "
            "load it with AutoModelForCausalLM."
        )
    modules = sale_hf.attention_layers(model)
    layers = {layer: sale_hf.query_heads(module) for layer, module in modules.items()}
    if len(set(layers.values())) != 1:
        raise NotImplementedError(f"model must have as many query heads in every attention layer, got {layers}.")
    sale_hf.register()
    text = model.config.get_text_config()
    parts = [name for name in getattr(model.config, "sub_configs", {}) if getattr(model.config, name, None) is text]
    before, training = text._attn_implementation, model.training

    def switch(name: str) -> None:
        model.set_attn_implementation({parts[0]: name} if parts else name)

    model.eval()
    switch(sale_hf.NAME)
    try:
        if any(state_of(module) is None for module in modules.values()):
            sale_hf.configure(model, SaleConfig())
        yield layers
    finally:
        switch(before)
        model.train(training)


@torch.no_grad()
def run(model: Any, text: Tokens, layers: Mapping[int, int], observer: Observer) -> Any:
    """A prefill of `text` in which `observer` computes attention.

    Returns:
        The output of the model's base, without logits.

    Raises:
        NotImplementedError: A call has other heads than the model, as under tensor parallelism.
        ValueError: A layer's attention did not run as prefill.
    """
    from sale_flex.integrations import transformers as sale_hf

    seen: set[int] = set()

    def observe(call: Any) -> Tensor:
        if call.query.shape[1] != layers[call.layer]:
            raise NotImplementedError(
                f"layer {call.layer} must run all of its {layers[call.layer]} query heads, got {call.query.shape[1]}; "
                "calibrate without tensor parallelism."
            )
        seen.add(call.layer)
        return observer(call)

    text = text.to(model.device)
    with sale_hf.observe(model, observe):
        output = model.base_model(input_ids=text.input_ids, attention_mask=text.attention_mask, use_cache=False)
    if seen != set(layers):
        raise ValueError(
            f"every attention layer must run as prefill on a text of {text.shape[1]} tokens, but layers "
            f"{sorted(set(layers) - seen)} did not; take longer texts."
        )
    return output


def mean_loss(model: Any, output: Any, text: Tokens) -> tuple[float, int]:
    """Mean loss over the predicted tokens of a text in nats, and how many there are; the rest as `token_losses`."""
    losses = token_losses(model, output, text)
    return losses.double().mean().item(), len(losses)


@torch.no_grad()
def token_losses(model: Any, output: Any, text: Tokens) -> Tensor:
    """Loss of every predicted token of a text in nats, float32 ``[targets]`` on the CPU.

    The logits are the model's own, of a range of positions at a time: its forward pass is run with a base that hands
    out parts of the hidden states there are.

    Args:
        model: A causal language model.
        output: Of `run`.
        text: What it was run on.
    """
    text = text.to(model.device)
    hidden, targets, base = output.last_hidden_state, text.targets(), model.base_model
    own = base.__dict__.get("forward")
    found = []
    try:
        for first in range(0, targets.shape[1], _POSITIONS):
            here = slice(first, min(first + _POSITIONS, targets.shape[1]))
            part = type(output)(**{**output, "last_hidden_state": hidden[:, here]})
            base.forward = lambda *_, part=part, **__: part
            logits = model(input_ids=text.input_ids[:, here], use_cache=False).logits
            wanted = targets[:, here].flatten().to(logits.device)
            losses = cross_entropy(logits.flatten(0, 1).float(), wanted, reduction="none")
            found.append(losses[wanted != -100].cpu())
    finally:
        del base.forward
        if own is not None:
            base.forward = own
    return torch.cat(found)
