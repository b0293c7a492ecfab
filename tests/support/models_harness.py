# SPDX-License-Identifier: BSD-3-Clause
"""Tiny random models of transformers, one per family, and what their tests share.

Sizes are equal over families (batch, length, heads, head_dim, scale), so that a flex_attention program is compiled once
and serves all that have its mods.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, StaticCache

import sale_flex.integrations.transformers as sale_hf
from sale_flex import Mass, SaleConfig
from sale_flex.stats import Path

sale_hf.register()
transformers.logging.set_verbosity_error()

CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters else "past_key_values"
"""Under which name this transformers takes a KV cache and gives it back: another one since 5.24."""

LENGTH = 160
"""Tokens of a prompt: two whole blocks and a half."""

PADDED = 40
"""Tokens of padding in the batch's first row: more than half a block, and no whole one."""

WINDOW = 50
"""Keys of a sliding window, tokens of a chunk: less than a block, so that windows and chunks end inside of them."""

CHUNKS = (64, 64, 32)
"""Lengths in which a prompt is handed in; the last is the shortest that is no decoding step."""

LAYERS = 2

BASE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,  # logits of attention of about 1, so that what is seen matters
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
ALTERNATING = ["sliding_attention", "full_attention"]
GEMMA = {"sliding_window": WINDOW, "query_pre_attn_scalar": 32, "layer_types": ALTERNATING}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 2}
"""All of them: a rounding error must not choose another one."""


@dataclass(frozen=True, eq=False)
class Family:
    """A family of models."""

    name: str
    options: dict[str, Any]
    """Of its config, besides `BASE`."""
    sparse_layers: tuple[int, ...] = tuple(range(LAYERS))
    """Layers with softmax attention."""
    local: bool = False
    """Whether some layer has a window, or chunks."""
    under_mods: bool = False
    """Whether some layer has a window, chunks, a soft cap or sinks."""
    decoder: bool = True

    def __repr__(self) -> str:
        return self.name


def local_family(name: str, **options: Any) -> Family:
    return Family(name, options, local=True, under_mods=True)


FAMILIES = (
    Family("Llama", {}),
    Family("Qwen3", {}),
    Family("Phi3", {}),
    Family("Mixtral", EXPERTS),
    Family(
        "Qwen3Next",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "num_experts": 2,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "partial_rotary_factor": 0.5,
        },
        sparse_layers=(1,),
    ),
    local_family("Qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    local_family("Mistral", sliding_window=WINDOW),
    # So low a cap that it bends logits of about 1, and a scale that is not that of its heads.
    local_family("Gemma2", **GEMMA | {"query_pre_attn_scalar": 20}, attn_logit_softcapping=2.0),
    local_family("Gemma3", **GEMMA),
    local_family("GptOss", sliding_window=WINDOW, layer_types=ALTERNATING, **EXPERTS),
    local_family("Llama4", attention_chunk_size=WINDOW, no_rope_layer_interval=2, intermediate_size_mlp=64, **EXPERTS),
    Family("Bert", {}, decoder=False, under_mods=True),
)
BY_NAME = {family.name: family for family in FAMILIES}
DECODERS = tuple(family for family in FAMILIES if family.decoder)
LOCAL = tuple(family for family in DECODERS if family.local)

EVERYTHING = SaleConfig(Mass(0.0), min_length=0, sink_tokens=0, local_tokens=1)
"""The sparse path, with every block kept because of its threshold."""

SELECTIVE = SaleConfig(Mass(0.3), min_length=0, sink_tokens=16, local_tokens=32, smooth_tokens=64)
"""Drops blocks even of random models, whose attention is spread evenly."""

PADDINGS = ("no padding", "left", "right")


def config_of(family: Family, **options: Any) -> Any:
    """Its config."""
    if family.name in ("Bert", "Phi3"):
        base = {name: value for name, value in BASE.items() if name not in ("head_dim",)}
    else:
        base = BASE
    if not family.decoder:
        base = {name: value for name, value in base.items() if name != "num_key_value_heads"}
    text = "Text" if family.name in ("Gemma3", "Llama4") else ""
    return getattr(transformers, f"{family.name}{text}Config")(**base | family.options | options)


def build(family: Family, implementation: str = "eager", config: Any = None, **options: Any) -> torch.nn.Module:
    """A model of random weights, the same at every call."""
    kind = "ForCausalLM" if family.decoder else "Model"
    made = config_of(family, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{family.name}{kind}")(made).eval()
    if not family.decoder:
        model.pooler = None  # it would be the one part whose output nobody compares
    model.set_attn_implementation(implementation)
    if implementation == sale_hf.NAME:
        sale_hf.configure(model, EVERYTHING if config is None else config)
    return model


@cache
def shared(family: Family) -> torch.nn.Module:
    """A dense model that many tests use; they must leave it as it is."""
    return build(family)


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 1) -> Tensor:
    """int64 ``[batch, length]``, without token ids that mean something."""
    return torch.randint(2, BASE["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def padding_mask(padding: str, batch: int = 2, length: int = LENGTH, amount: int = PADDED) -> Tensor | None:
    """int64 ``[batch, length]``, 0 for the padding of the first row, which alone has any."""
    if padding == "no padding":
        return None
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, slice(amount) if padding == "left" else slice(length - amount, None)] = 0
    return mask


def make_cache(kind: str, model: torch.nn.Module, room: int = LENGTH + 8) -> Any:
    """A KV cache.

    Args:
        kind: ``"none"``; ``"dynamic"``, in which layers with a window keep no more than it; ``"whole"``, the same
            keeping everything; ``"static"``.
        model: For which model.
        room: Tokens of a static cache.
    """
    if kind == "none":
        return None
    if kind == "whole":
        return DynamicCache()
    return (
        DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=room)
    )


def outputs(result: Any) -> Tensor:
    """Logits of a decoder, hidden states of an encoder."""
    return result.logits if "logits" in result else result.last_hidden_state


@torch.no_grad()
def prefill(
    model: Callable[..., Any],
    ids: Tensor,
    mask: Tensor | None = None,
    cache: Any = None,
    chunks: tuple[int, ...] | None = None,
    decode: int = 0,
    **options: Any,
) -> Tensor:
    """Outputs of a prompt, and of decoding steps behind it, ``[batch, length, ...]``.

    Args:
        model: The model.
        ids: Token ids of the prompt, and of the steps.
        mask: Of the prompt.
        cache: The KV cache, or None.
        chunks: Lengths in which the prompt is handed in; None for all at once.
        decode: How many of the last tokens are handed in alone.
        options: For the model.
    """
    length = ids.shape[1] - decode
    chunks = (length,) if chunks is None else chunks
    assert sum(chunks) == length
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], decode)], 1)
    parts, at = [], 0
    if cache is not None:
        options |= {CACHE: cache, "use_cache": True}
    elif hasattr(getattr(model, "config", None), "use_cache"):
        options |= {"use_cache": False}
    for step in (*chunks, *[1] * decode):
        stop = at + step
        if mask is not None:
            options["attention_mask"] = mask[:, :stop]
        parts.append(outputs(model(ids[:, at:stop], **options)))
        at = stop
    return torch.cat(parts, 1)


def allowed(expected: Tensor, layers: int = LAYERS) -> float:
    """How far two float32 runs of a model may be apart that differ in the order of their sums.

    A sum of n terms is off by at most ``gamma(n)`` of their magnitudes, n u in first order (Higham, Accuracy and
    Stability of Numerical Algorithms, section 3.1), and, errors being of both signs, by about sqrt(n) u (section 2.8).
    What differs is attention: per layer a sum over channels (32, and logits of about 1 pass on their error as it is)
    and two over keys (at most 256 here), so with n = 256 no more than 3 * 16 u of its output's magnitude each run.
    Normalisation behind every layer keeps errors relative to the size of what it is handed, so they add up over
    layers. A factor of 4 stands for the largest of some 10,000 outputs. Logits that see other keys than they should
    are off by 0.01 and more.
    """
    return 2 * 3 * 16 * layers * 4 * torch.finfo(torch.float32).eps / 2 * float(expected.abs().max())


def assert_close(output: Tensor, expected: Tensor, live: Tensor | None = None) -> None:
    """Assert that two runs agree where tokens are no padding.

    Args:
        output: ``[B, S, ...]`` of the sparse model.
        expected: Of the dense one.
        live: ``[B, S]`` or shorter: not 0 where it matters; what is behind it matters.
    """
    assert output.shape == expected.shape
    error = (output - expected).abs().flatten(2).amax(2)
    if live is not None:
        error[:, : live.shape[1]][live == 0] = 0.0
    bound = allowed(expected)
    assert error.max() <= bound, (
        f"off by {float(error.max()):.3g} at {(error == error.max()).nonzero()[0].tolist()}, {bound:.2g} allowed"
    )


def assert_calls(model: torch.nn.Module, family: Family, *, sparse: int, decode: int = 0, dense: int = 0) -> None:
    """Assert how often every attention layer ran sparse, dense and as a decoding step, and that none ran otherwise."""
    counted = sale_hf.stats(model)
    assert tuple(layer.layer for layer in counted.layers) == family.sparse_layers
    for layer in counted.layers:
        assert (layer.sparse_calls, layer.dense_calls, layer.decode_calls) == (sparse, dense, decode), str(counted)
        assert layer.dropped_blocks == 0


def assert_sparse_paths(model: torch.nn.Module) -> None:
    """Assert that no prefill call outside a compiled program took a dense path."""
    for layer in sale_hf.stats(model).layers:
        assert layer.paths
        assert sum(layer.paths.values()) == layer.sparse_calls
        ran = {path.partition(": ")[0] for path in layer.paths}  # what follows is why
        assert ran <= {Path.FLEX.value, Path.TORCH_ROWS.value}, layer.paths


def case_ids(cases: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Parameters with readable names."""
    return [pytest.param(*case, id="-".join(str(part) for part in case)) for case in cases]


def prefill_cases(families: tuple[Family, ...]) -> Iterator[tuple[Family, str, str, str]]:
    """Family, padding, cache and way of handing the prompt in, whatever makes sense together.

    Chunks want a cache. A cache that keeps what a window forgets is another one only where there are windows.
    """
    for family in families:
        for padding in PADDINGS:
            yield family, padding, "none", "at once"
            for kind in ("dynamic", "static", *(["whole"] if family.local else [])):
                for way in ("at once", "in chunks"):
                    yield family, padding, kind, way


def check_prefill(family: Family, padding: str, kind: str, way: str) -> None:
    """A prompt, and two decoding steps if there is a cache, are eager's; and the sparse path it was that ran."""
    chunks = CHUNKS if way == "in chunks" else None
    decode = 0 if kind == "none" else 2
    ids, mask = tokens(length=LENGTH + decode), padding_mask(padding)
    model = build(family, sale_hf.NAME)
    expected, output = (
        prefill(each, ids, mask, make_cache(kind, each), chunks, decode) for each in (shared(family), model)
    )
    assert_close(output, expected, mask)
    assert_calls(model, family, sparse=len(chunks or [0]), decode=decode)
    assert_sparse_paths(model)
    assert all(set(layer.density) == {1.0} for layer in sale_hf.stats(model).layers)


def packed_positions(*documents: tuple[int, ...]) -> Tensor:
    """int64 ``[B, S]``: positions in documents of these lengths, a tuple for every batch row."""
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in documents])


def check_packed(family: Family, *documents: tuple[int, ...]) -> None:
    """Documents in one row are what each is alone."""
    positions = packed_positions(*documents)
    ids = tokens(batch=len(documents))
    model = build(family, sale_hf.NAME)
    output = prefill(model, ids, position_ids=positions)
    assert_close(output, prefill(shared(family), ids, position_ids=positions))
    assert_calls(model, family, sparse=1)
    assert_sparse_paths(model)


NEW = 4
"""Tokens to generate."""

WAYS = {
    "dynamic": ({}, 1),
    "static": ({"cache_implementation": "static"}, 1),
    "dynamic, in chunks": ({"prefill_chunk_size": 64}, 3),
    "static, in chunks": ({"cache_implementation": "static", "prefill_chunk_size": 64}, 3),
    "beams": ({"num_beams": 2}, 1),
}
"""Options of generate, and how many calls the prompt takes."""


def generate_cases(families: tuple[Family, ...]) -> Iterator[tuple[Family, str, str]]:
    """Family, way of generating, padding."""
    for family in families:
        for way in WAYS:
            # generate of transformers 5.17 fails for Llama 4 with a static cache, whatever its attention.
            old = transformers.__version__.startswith("5.17.")
            if not (old and family.name == "Llama4" and way.startswith("static")):
                yield from ((family, way, padding) for padding in ("no padding", "left"))


def generated(model: torch.nn.Module, ids: Tensor, mask: Tensor, **options: Any) -> tuple[Tensor, Tensor, Any]:
    """Token ids, logits ``[rows, NEW, vocabulary]``, and the cache."""
    result = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        disable_compile=True,  # of decoding steps, which are dense
        **options,
    )
    return result.sequences, torch.stack(result.logits, 1), result[CACHE]


def check_generate(family: Family, way: str, padding: str) -> None:
    """Tokens and logits are eager's."""
    options, calls = WAYS[way]
    rows = 1 if way == "beams" else 2  # two beams are two rows for the model
    ids, mask = tokens()[:rows], padding_mask(padding)
    mask = torch.ones_like(ids) if mask is None else mask[:rows]
    model = build(family, sale_hf.NAME)
    (sequences, logits, _), (expected, wanted, _) = (
        generated(each, ids, mask, **options) for each in (model, shared(family))
    )
    assert torch.equal(sequences, expected)
    assert_close(logits, wanted)
    assert_calls(model, family, sparse=calls, decode=NEW - 1)
    assert_sparse_paths(model)


def check_second_turn(family: Family) -> None:
    """A prompt that goes on from the cache of an earlier generate."""
    model, more = build(family, sale_hf.NAME), tokens(length=WINDOW, seed=2)
    results = []
    for each in (model, shared(family)):
        ids, _, cache = generated(each, tokens(), torch.ones_like(tokens()))
        ids = torch.cat([ids, more], 1)
        results.append(generated(each, ids, torch.ones_like(ids), **{CACHE: cache})[:2])
    (ids, logits), (expected, wanted) = results
    assert torch.equal(ids, expected)
    assert_close(logits, wanted)
    # The last token of the first turn had no step of its own, so the second turn's call has it too.
    assert ids.shape[1] == LENGTH + NEW + WINDOW + NEW
    assert_calls(model, family, sparse=2, decode=2 * (NEW - 1))
    assert_sparse_paths(model)
