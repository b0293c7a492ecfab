# SPDX-License-Identifier: BSD-3-Clause
"""What a layer's queries see: transformers' description of it, kept unevaluated until sale_attention takes it.

transformers asks for a mask once per kind of layer and forward pass, and hands the answer to every attention call of
that kind. Ours holds positions, not elements: nothing of the size of queries times keys is ever built for a prompt.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import (
    add_offsets_to_mask_function,
    bidirectional_mask_function,
    causal_mask_function,
    padding_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)

from sale_flex import mods
from sale_flex.integrations.transformers.chunks import chunked
from sale_flex.integrations.transformers.not_a_tensor import NotATensor, sentence
from sale_flex.integrations.transformers.padding import Padding, padding_of, values_are_readable
from sale_flex.integrations.transformers.refused import refuse
from sale_flex.mods import MaskMod
from sale_flex.mods.held import held

DENSE_QUERIES = 32
"""Calls of fewer queries are decoding steps: dense, under an explicit mask. Half a block of `SaleConfig`'s default."""


class Looks(NamedTuple):
    """What the queries of a call see of the keys handed in with them."""

    causal: bool
    """Whether no key behind a query's own position."""
    window: int | None
    """If given, so many keys, the query's own the last."""
    chunk: int | None
    """If given, the query's own chunk of so many tokens, counted from the first valid one."""
    custom: tuple[Callable[..., Tensor], ...]
    """What transformers says besides, as its mask functions of positions in the sequence."""
    q_len: int
    keys: int
    """How many of the keys handed in count; others are room of a static cache."""
    q_offset: int | Tensor
    """Key index of the first query, a 0-d tensor where its value can not be read."""
    kv_offset: int | Tensor
    """Position in the sequence of the first key handed in."""
    padding: Padding | None
    """Of the sequence, if any and if the call is causal; otherwise it is among `custom`."""


class ModelMask(NotATensor):
    """A layer's mask, unevaluated.

    It is a BlockMask because transformers lets a mask that was prepared before the forward pass through only where it
    is one. It has nothing else of it: evaluating it raises, and so does all that a model does with a tensor.

    Attributes:
        looks: What is seen.
    """

    def __init__(self, looks: Looks, device: torch.device | str) -> None:
        one = torch.ones(1, 1, 1, dtype=torch.int32, device=device)
        index = torch.zeros(1, 1, 1, 1, dtype=torch.int32, device=device)
        none: Any = None  # torch's annotations want tensors where it takes None
        lengths = (looks.q_len, looks.keys)
        super().__init__(lengths, one, index, none, none, none, none, none, none, lengths, _not_for_others)
        self.looks = looks
        self._compiling = torch.compiler.is_compiling()
        self._options: dict[str, Any] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of sale_attention that say what is seen, on the first ``looks.keys`` keys handed in.

        Made when the first layer asks: models prepare masks for kinds of layers that they do not have.

        Raises:
            ValueError: A window or a chunk has less than one token.
        """
        if self._options is not None:
            return self._options
        options = _options(self.looks, self.kv_indices.device)
        # A compiled program can not leave what it traced on a mask that was handed to it.
        if self._compiling == torch.compiler.is_compiling():
            self._options = options
        return options

    def __repr__(self) -> str:
        return f"ModelMask({self.looks})"

    __str__ = __repr__

    def contiguous(self) -> "ModelMask":
        """Itself; transformers asks this of the masks it prepares for static caches."""
        return self

    def to(
        self, device: torch.device | str | int | None = None, dtype: Any = None, non_blocking: bool = False
    ) -> "ModelMask":
        """The same for another device, for models whose layers are on several.

        Raises:
            NotImplementedError: The mask is of functions of transformers', whose tensors can not be reached.
            TypeError: A dtype or a tensor is given.
        """
        if dtype is not None or not isinstance(device, torch.device | str | int):
            raise TypeError(sentence(".to() something else than a device"))
        device = torch.empty(0, device=device).device
        looks, padding = self.looks, self.looks.padding
        if device == self.kv_indices.device:
            return self
        if looks.custom:
            raise NotImplementedError(
                "attn_implementation='sale_flex' can not move packed or composed masks between devices, from "
                f"{self.kv_indices.device} to {device}; keep such a model on one device."
            )
        q_offset, kv_offset = (x.to(device) if isinstance(x, Tensor) else x for x in (looks.q_offset, looks.kv_offset))
        if padding is not None:
            padding = padding._replace(valid=padding.valid.to(device))
        return ModelMask(looks._replace(q_offset=q_offset, kv_offset=kv_offset, padding=padding), device)


def sale_flex_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Tensor] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> ModelMask | Tensor | None:
    """The mask function of transformers' ``AttentionMaskInterface``.

    Args:
        batch_size: B.
        q_length: Queries of the call.
        kv_length: Keys handed in with them; with a static cache, its size.
        q_offset: Position in the sequence of the first query.
        kv_offset: Position in the sequence of the first key.
        mask_function: ``mask(b, h, q, kv)`` of positions in the sequence.
        attention_mask: bool ``[B, S]``: valid tokens, or None. In a causal prompt a query that is padding itself sees
            nothing: attention gives it 0, where transformers' sdpa lets it attend to the valid tokens before it. Valid
            tokens get the same from either.
        local_size: Of a sliding window or of chunks.
        allow_is_causal_skip: False if `mask_function` is more than causality, a window or chunks.
        allow_is_bidirectional_skip: The same for a mask that shows everything.
        device: Of queries and keys.
        config: The model's.
        kwargs: For the explicit mask of a decoding step.

    Returns:
        None for plain causal attention of a whole prompt, and for attention that sees everything; the explicit mask of
        a decoding step, bool ``[B, 1, Sq, Skv]``, or of cross-attention, ``[B, 1, 1, Skv]``; for everything else a
        `ModelMask`.

    Raises:
        UnsupportedModelError: sale_flex does not compute the model's attention; a ValueError and NotImplementedError.
    """
    refuse(config)
    # A window or a chunk of no token is that of no layer; if it is, the mask will say so.
    nowhere = isinstance(local_size, int) and local_size < 1
    if q_length < DENSE_QUERIES and not nowhere:
        mask: Tensor | None = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            device=device,
            **kwargs,
        )
        return mask
    device = torch.device(device)
    first = not isinstance(q_offset, Tensor) and q_offset == 0 and kv_offset == 0
    if mask_function is bidirectional_mask_function and q_length != kv_length and first:
        return _cross_mask(batch_size, kv_length, attention_mask, allow_is_bidirectional_skip, device)
    if isinstance(q_offset, Tensor) and values_are_readable(device):
        q_offset = int(q_offset)  # once per forward pass, as transformers' own masks do
    looks = Looks(False, None, None, (), q_length, kv_length, q_offset - kv_offset, kv_offset, None)
    if mask_function is causal_mask_function:
        looks = looks._replace(causal=True)
    elif mask_function is not bidirectional_mask_function:
        looks = _local_or_custom(looks, mask_function, local_size, allow_is_causal_skip, config)
    if looks.causal and not isinstance(looks.q_offset, Tensor):
        looks = looks._replace(keys=min(kv_length, looks.q_offset + q_length))
    if attention_mask is not None:
        looks = _padded(looks, attention_mask)
    looks = _without_idle(looks)
    if _is_plain(looks) and (allow_is_causal_skip if looks.causal else allow_is_bidirectional_skip):
        return None
    return ModelMask(looks, device)


def _cross_mask(
    batch_size: int, kv_length: int, attention_mask: Tensor | None, may_be_none: bool, device: torch.device
) -> Tensor | None:
    """Cross-attention: queries have no place among the keys, so it is dense, under the valid keys of each batch row.

    Returns:
        bool ``[B, 1, 1, Skv]``, or None.
    """
    if attention_mask is not None:
        return prepare_padding_mask(attention_mask, kv_length, 0)[:, None, None, :kv_length]
    return None if may_be_none else torch.ones(batch_size, 1, 1, kv_length, dtype=torch.bool, device=device)


def _local_or_custom(
    looks: Looks, mask_function: Callable[..., Tensor], local_size: int | None, pure: bool, config: Any
) -> Looks:
    """A window or chunks where that is all there is; transformers tells them apart by the model's config alone."""
    window, chunk = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    if pure and local_size is not None and local_size in (window, chunk) and window != chunk:
        looks = looks._replace(causal=True)
        return looks._replace(window=window) if local_size == window else looks._replace(chunk=chunk)
    return looks._replace(custom=(mask_function,))


def _padded(looks: Looks, attention_mask: Tensor) -> Looks:
    """With the padding among the keys that count."""
    everything = prepare_padding_mask(attention_mask, looks.keys, looks.kv_offset)
    if not isinstance(looks.kv_offset, Tensor):
        everything = everything[:, : looks.kv_offset + looks.keys]
    padding, custom = None, True
    if looks.causal:
        padding = padding_of(everything)
        custom = padding is not None and padding.holes
    elif values_are_readable(everything.device):
        custom = not bool(everything.all())
    if custom:
        # Without causality the queries may be those of another sequence: only keys are known to be padding.
        return looks._replace(custom=(*looks.custom, padding_mask_function(held(everything))))
    return looks._replace(padding=padding)


def _without_idle(looks: Looks) -> Looks:
    """Without a window or chunks that hide nothing."""
    if isinstance(looks.window, int) and looks.keys <= looks.window:
        looks = looks._replace(window=None)
    in_sequence = looks.kv_offset + looks.keys
    if isinstance(looks.chunk, int) and not isinstance(in_sequence, Tensor) and in_sequence <= looks.chunk:
        looks = looks._replace(chunk=None)
    return looks


def _is_plain(looks: Looks) -> bool:
    """Whether all is seen, or all but what is behind a query, of a prompt that begins with its first key."""
    if looks.padding is not None or looks.window is not None or looks.chunk is not None or looks.custom:
        return False
    return all(not isinstance(x, Tensor) and x == 0 for x in (looks.q_offset, looks.kv_offset))


def _options(looks: Looks, device: torch.device | str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    q_offset = looks.q_offset
    if isinstance(q_offset, Tensor) or q_offset != looks.keys - looks.q_len:
        options["q_offset"] = q_offset
    if not looks.causal:
        options["is_causal"] = False
    if looks.padding is not None:
        options["kv_range"] = (looks.padding.valid - looks.kv_offset).clamp(0, looks.keys)
    parts: list[MaskMod] = []
    # As tensors, offsets can change from chunk to chunk of a prompt without a new program.
    at, origin = (_tensor(x, device) for x in (q_offset, looks.kv_offset))
    if looks.window is not None:
        parts.append(mods.sliding_window(looks.window, at))
    if looks.chunk is not None:
        first = torch.zeros(1, dtype=torch.int32, device=device)
        if looks.padding is not None:
            first = looks.padding.valid[:, 0]
        parts.append(chunked(looks.chunk, first - looks.kv_offset, at))
    for mask_function in looks.custom:
        moved = isinstance(at, Tensor) or isinstance(origin, Tensor)
        parts.append(add_offsets_to_mask_function(mask_function, at + origin, origin) if moved else mask_function)
    if parts:
        options["mask_mod"] = parts[0] if len(parts) == 1 else mods.and_masks(*parts)
    return options


def _tensor(offset: int | Tensor, device: torch.device | str) -> int | Tensor:
    """A position as a 0-d tensor, unless it is 0."""
    if isinstance(offset, Tensor):
        return offset.to(device)
    return torch.full((), offset, dtype=torch.int32, device=device) if offset != 0 else 0


def _not_for_others(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    raise TypeError(sentence("in flex_attention"))
