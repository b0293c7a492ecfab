# SPDX-License-Identifier: BSD-3-Clause
"""Dense causal attention, what times are divided by: SDPA's backends, and compiled flex_attention."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from sale_flex.bench.inputs import Inputs

BASELINES = {
    "cudnn": "cuDNN SDPA",
    "flash": "FlashAttention-2 SDPA",
    "flex": "compiled flex_attention",
    "sdpa": "SDPA, torch's own choice",
}
"""Name -> what it is."""

_BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


class NotRun(RuntimeError):
    """A candidate cannot run here; the message is the reason."""


def baseline(name: str, inputs: Inputs) -> Callable[[], Tensor]:
    """A call of one of `BASELINES` on the inputs, ``[B, Hq, S, D]``.

    Raises:
        NotRun: It needs a device that the inputs are not on. What else cannot run raises RuntimeError when called.
    """
    if name in _BACKENDS and not inputs.query.is_cuda:
        raise NotRun("needs a CUDA device")
    return _flex(inputs) if name == "flex" else partial(_sdpa, inputs, _BACKENDS.get(name))


def _sdpa(inputs: Inputs, backend: SDPBackend | None) -> Tensor:
    query, key, value, scale = inputs
    grouped = query.shape[1] != key.shape[1]
    attend = partial(scaled_dot_product_attention, is_causal=True, scale=scale, enable_gqa=grouped)
    if backend is None:
        return attend(query, key, value)
    with sdpa_kernel(backend):
        return attend(query, key, value)


def _flex(inputs: Inputs) -> Callable[[], Tensor]:
    query, key, value, scale = inputs
    mask = causal_block_mask(query.shape[2], query.device)
    program = torch.compile(flex_attention, fullgraph=True)
    grouped = query.shape[1] != key.shape[1]
    return partial(program, query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped)


def causal_block_mask(length: int, device: torch.device, block: int = 128) -> BlockMask:
    """flex_attention's mask of dense causal attention, without the S x S matrix that `create_block_mask` builds."""
    blocks = math.ceil(length / block)
    row = torch.arange(blocks, dtype=torch.int32, device=device)
    diagonal = row[None, None, :, None].expand(1, 1, blocks, blocks).contiguous()
    below = row.expand(1, 1, blocks, blocks).contiguous()
    return BlockMask.from_kv_blocks(
        torch.ones_like(row)[None, None],
        diagonal,
        row[None, None].clone(),
        below,
        BLOCK_SIZE=block,
        mask_mod=_causal,
        seq_lengths=(length, length),
        compute_q_blocks=False,
    )


def _causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx >= kv_idx
