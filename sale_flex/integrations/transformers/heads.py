# SPDX-License-Identifier: BSD-3-Clause
"""Heads of other sizes than sale_attention takes, padded with zero channels, which change no score and no output."""

from torch import Tensor
from torch.nn.functional import pad

from sale_flex.call.validation import HEAD_DIMS


def pad_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of one supported head_dim; the output's further channels are 0.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``.
        value: ``[B, Hkv, Skv, Dv]``.

    Raises:
        ValueError: A head is wider than the widest supported.
    """
    width = max(query.shape[3], value.shape[3])
    size = next((dim for dim in HEAD_DIMS if dim >= width), None)
    if size is None:
        raise ValueError(
            f"attn_implementation='sale_flex' takes heads of at most {HEAD_DIMS[-1]} channels, got {width}; use "
            "attn_implementation='sdpa' for this model."
        )

    def padded(x: Tensor) -> Tensor:
        return x if x.shape[3] == size else pad(x, (0, size - x.shape[3]))

    return padded(query), padded(key), padded(value)
