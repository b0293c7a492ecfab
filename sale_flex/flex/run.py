# SPDX-License-Identifier: BSD-3-Clause
"""Compiled flex_attention: the tile options it needs for small blocks, and one compiled callable per program.

Uncompiled flex_attention is dense and builds an S x S matrix, and a callable compiled without ``fullgraph`` falls back
to that silently once torch's recompile limit is reached. So each program here is compiled with ``fullgraph=True`` from
a code object of its own, which the limit counts by itself.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from sale_flex import ops
from sale_flex.flex.programs import CompiledProgram, NotCompiledError
from sale_flex.mods import ScoreMod
from sale_flex.mods.compiler import Sized, identity, sized
from sale_flex.mods.compiler.isolation import dispatch_modes
from sale_flex.mods.held import held

_TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

_TILES = {
    (64, 64): (64, 64, 4, 3),
    (64, 32): (64, 32, 4, 3),
    (128, 64): (64, 64, 4, 3),
    (128, 128): (64, 64, 4, 3),
}
"""(rows, keys, warps, stages) of a tile per block size. Measured on an H200 with 128 channels of 16 bits
(docs/decisions.md); wider heads keep the tile and give up stages."""

_NARROW_TILES = _TILES | {(128, 64): (128, 64, 4, 3), (128, 128): (128, 64, 4, 3)}
"""The same for heads of at most `_NARROW` channels."""

_NARROW = 64
"""Channels up to which the tensor memory accelerator costs time instead of saving it."""

_PROGRAMS = 512
"""Programs kept; of more, the one not used for longest is compiled again when it is needed."""

_SHARED_MEMORY = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227, (10, 3): 227}
"""KiB a program may take, by compute capability; other GPUs get the smallest, 99."""


def flex_kernel_options(query: Tensor, block_size: tuple[int, int]) -> dict[str, Any]:
    """The ``kernel_options`` with which flex_attention runs blocks of `block_size`.

    Torch before 2.14 does not fit its tiles to small mask blocks by itself and raises; these options do it for every
    supported torch, and keep short calls off the decoding kernel, which does not know small blocks either.

    Args:
        query: ``[B, Hq, Sq, D]``: its device, dtype and head_dim decide.
        block_size: (query rows, keys) of the mask's blocks, as in `SaleConfig`.

    Returns:
        Options for ``flex_attention(..., kernel_options=...)``; empty except on CUDA.
    """
    if not query.is_cuda:
        return {}
    capability = torch.cuda.get_device_capability(query.device)
    shared = _SHARED_MEMORY.get(capability, 99)
    options = _tile_options(query.shape[3], query.element_size(), (block_size[0], block_size[1]), shared)
    return options | ({"USE_TMA": True} if capability >= (9, 0) and query.shape[3] > _NARROW else {})


def _tile_options(head_dim: int, element_size: int, block_size: tuple[int, int], shared_kib: int) -> dict[str, Any]:
    block_m, block_n, warps, stages = (_NARROW_TILES if head_dim <= _NARROW else _TILES)[block_size]
    row = (1 << (head_dim - 1).bit_length()) * element_size

    def fits() -> bool:
        # The query tile, and a key and a value tile per stage; an eighth is left to the compiler.
        return block_m * row + 2 * stages * block_n * row <= shared_kib * 1024 * 7 // 8

    while not fits() and stages > 1:
        stages -= 1
    while not fits() and block_n > 16:
        block_n //= 2
    while not fits() and block_m > 16:
        block_m //= 2
    return {"BACKEND": "TRITON", "BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}


def check_backward(query: Tensor, block_size: tuple[int, int]) -> None:
    """Raise NotImplementedError where torch can not differentiate flex_attention on blocks of `block_size`."""
    if not query.is_cuda:
        raise NotImplementedError(
            f"sale_attention computes no gradients on {query.device.type}, but query, key, value or sink_logits "
            "requires one: torch's flex_attention has no backward pass there. Call it under torch.no_grad(), detach "
            "the inputs, or move them to a GPU."
        )
    if _TORCH >= (2, 14):
        return  # its tiles adapt to the blocks
    tile = _backward_tile(query.shape[3], query.dtype)
    if any(size % tile for size in block_size):
        fitting = [size for size in ((64, 64), (128, 128)) if not any(x % tile for x in size)]
        raise NotImplementedError(
            f"config.block_size must have multiples of {tile} for gradients of heads of {query.shape[3]} channels in "
            f"{query.dtype} on torch {torch.__version__}, got {block_size}; take one of {fitting}, or torch 2.14, "
            "which fits its backward tiles to small blocks."
        )


def _backward_tile(head_dim: int, dtype: torch.dtype) -> int:
    """Rows and keys of the largest tile of flex_attention's backward pass, which torch before 2.14 does not shrink."""
    if dtype == torch.float32:
        return 16
    return 64 if head_dim < 64 or head_dim > 128 else 128


def run_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    scale: float,
    kernel_options: dict[str, Any] | None = None,
    score_mod: ScoreMod | None = None,
    return_lse: bool = False,
    backward: bool = False,
    has_mods: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention on the blocks of `block_mask`, always through the compiler.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``.
        value: ``[B, Hkv, Skv, D]``.
        block_mask: What to attend to; its mask_mod may be replaced by one that shows the same.
        scale: Softmax scale.
        kernel_options: Options over those of `flex_kernel_options`.
        score_mod: The user's.
        return_lse: Whether the log-sum-exp is wanted too.
        backward: Whether a gradient may be asked for.
        has_mods: Whether `score_mod` or the mask_mod is the user's.

    Returns:
        ``[B, Hq, Sq, D]``, and float32 ``[B, Hq, Sq]`` in nats, or None if not wanted.
    """
    options: Any = flex_kernel_options(query, block_mask.BLOCK_SIZE)
    if backward:
        # The backward pass takes its own tiles, warps and stages.
        options = {name if name == "BACKEND" else f"fwd_{name}": value for name, value in options.items()}
    else:
        # The CPU program refuses tensors that require a gradient even where none is recorded.
        query, key, value = query.detach(), key.detach(), value.detach()
    options |= kernel_options or {}
    grouped = query.shape[1] != key.shape[1]
    # An export is not for Inductor alone, and a length that its program guards would be one that it refuses.
    resized = has_mods and query.device.type == "cpu" and not torch.compiler.is_exporting()
    if torch.compiler.is_compiling():
        if query.device.type == "cpu":
            # Inductor's C++ template reads some views of what the same program computes, such as the parts of a fused
            # projection after a rotary embedding, from the wrong places (torch 2.13); copies it reads right.
            query, key, value = held(query), held(key), held(value)
        if resized:
            score_mod, block_mask.mask_mod = sized(score_mod, "score").mod, sized(block_mask.mask_mod, "mask").mod
        return _flex(query, key, value, block_mask, score_mod, scale, grouped, options, return_lse)
    modes = dispatch_modes()
    _refuse_graphs(modes)
    if query.is_meta or isinstance(query, FakeTensor):
        return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32) if return_lse else None
    mods = [Sized(x, identity(x)) for x in (score_mod, block_mask.mask_mod)]
    if resized:
        mods = [sized(score_mod, "score"), sized(block_mask.mask_mod, "mask")]
        score_mod, block_mask.mask_mod = (x.mod for x in mods)
    program = _program(
        query.device,
        query.dtype,
        (query.shape[0], query.shape[1], key.shape[1], query.shape[3]),
        block_mask.BLOCK_SIZE,
        scale,
        _specialisations(query, key, value, block_mask.BLOCK_SIZE),
        tuple(sorted(options.items())),
        *(x.identity for x in mods),
        return_lse,
        backward and (query.requires_grad, key.requires_grad, value.requires_grad),
        torch.is_grad_enabled(),
    )
    result: tuple[Tensor, Tensor | None] = program(
        query, key, value, block_mask, score_mod, scale, grouped, options, return_lse
    )
    if modes:
        _show(modes, query, value, block_mask)
    return result


def _refuse_graphs(modes: list[Any]) -> None:
    if any(isinstance(mode, ProxyTorchDispatchMode) for mode in modes):
        raise NotImplementedError(
            "sale_attention can not be recorded by make_fx (ProxyTorchDispatchMode is on): its graph would hold this "
            "call's output as a constant. Record it with torch.export, or compile the caller with torch.compile."
        )


def _show(modes: list[Any], query: Tensor, value: Tensor, block_mask: BlockMask) -> None:
    """Let dispatch modes, which were set aside, see that attention ran, and FLOP counters count it."""
    for mode in modes:
        formulas = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if formulas is not None:
            formulas.setdefault(torch.ops.sale_flex.attended, _count_flops)
    full_num = block_mask.full_kv_num_blocks
    assert full_num is not None, "our lists are two"
    ops.attended(query.detach(), value.detach(), block_mask.kv_num_blocks, full_num, *block_mask.BLOCK_SIZE)


def _count_flops(
    query: Tensor, value: Tensor, partial_num: Tensor, full_num: Tensor, block_q: int, block_k: int, **_: Any
) -> int:
    """Two products, of two operations an element, on all of every kept block."""
    kept = (partial_num + full_num).expand(query.shape[0], query.shape[1], -1).sum()
    return 2 * int(kept) * block_q * block_k * (query.shape[3] + value.shape[3])


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    score_mod: ScoreMod | None,
    scale: float,
    grouped: bool,
    options: Any,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    # Asked for or not, an auxiliary request makes torch's CPU program refuse the call.
    aux: dict[str, Any] = {"return_aux": AuxRequest(lse=True)} if return_lse else {}
    result: Any = flex_attention(
        query,
        key,
        value,
        score_mod=score_mod,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=grouped,
        kernel_options=options,
        **aux,
    )
    return (result[0], result[1].lse) if return_lse else (result, None)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    score_mod: ScoreMod | None,
    scale: float,
    grouped: bool,
    options: Any,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    if not torch.compiler.is_compiling():
        raise NotCompiledError(
            "sale_attention needs torch.compile, which is switched off (TORCH_COMPILE_DISABLE, TORCHDYNAMO_DISABLE or "
            "torch.compiler.set_stance): uncompiled flex_attention would ignore the block mask's indices. Switch it "
            "on, or call flex_attention with create_sale_block_mask, whose mask_mod is exact uncompiled too."
        )
    return _flex(query, key, value, block_mask, score_mod, scale, grouped, options, return_lse)


def _specialisations(query: Tensor, key: Tensor, value: Tensor, block_size: tuple[int, int]) -> tuple[Any, ...]:
    """What the compiler bakes into a program though lengths are dynamic.

    These are dimensions of size 1, dimensions of equal size, and the strides that no length multiplies. One program
    that met every combination of them would be compiled more often than torch's recompile limit allows.
    """
    q_len, kv_len = query.shape[2], key.shape[2]
    layouts = tuple((x.stride(1) < x.stride(2), x.stride(2), x.stride(3)) for x in (query, key, value))
    return (q_len == kv_len, q_len <= block_size[0], kv_len <= block_size[1], layouts)


@lru_cache(maxsize=_PROGRAMS)
def _program(*key: Any) -> CompiledProgram:
    """A compiled `_attend` of its own for every key; lengths are dynamic, all else in the key is not."""
    return CompiledProgram(_attend, f"{_attend.__name__}_{abs(hash(key)):x}")
