# SPDX-License-Identifier: BSD-3-Clause
"""Which key a query row sees: positions, the mask_mod and the caller's own block mask.

Jit helpers that the kernels of calls under mods share. A mask_mod comes as a jit function, known when a kernel is
built, and a tuple of what it reads, or as None.
"""

import triton
import triton.language as tl
from torch import Tensor

from .arguments import MaskSpec


@triton.jit
def allowed(
    b, h, q, kv, first_key, listed_ptr, words, AUX,
    MASK: tl.constexpr, LISTED_Q: tl.constexpr, LISTED_K: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """What mask_mod and block mask say of rows and keys that there are, int1 of their broadcast shape.

    Args:
        b: Batch row.
        h: Query head.
        q: Query rows, int32 ``[M, 1]``.
        kv: Keys, int32 ``[1, N]``.
        first_key: A multiple of SPAN, not above any key.
        listed_ptr: Words of the caller's block mask of the batch row and head, int32 ``[nq', words]``; not read if
            LISTED_Q is 0.
        words: Words a row of blocks of the caller's block mask.
        AUX: What the mask_mod reads.
        MASK: The mask_mod, or None.
        LISTED_Q: Query rows a block of the caller's block mask; 0 without one.
        LISTED_K: Keys a block of the caller's block mask.
        SPAN: All keys are fewer than this many after `first_key`.
    """
    result = (q == q) & (kv == kv)
    if MASK is not None:
        result = result & (MASK(b, h, q, kv, AUX) != 0)
    if LISTED_Q > 0:
        # Where all keys lie in one block, a row needs one word.
        block = (first_key if LISTED_K % SPAN == 0 else kv) // LISTED_K
        listed_words = tl.load(listed_ptr + (q // LISTED_Q).to(tl.int64) * words + block // 32)
        result = result & (((listed_words >> (block % 32)) & 1) != 0)
    return result


@triton.jit
def sees_key(
    b, h, q, kv, first_key, offset, start, end, q_len, kv_len, listed_ptr, words, AUX,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, LISTED_Q: tl.constexpr, LISTED_K: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Which key each row sees, int1 ``[M, N]``; rows and keys outside the tensors count as not seen.

    Args:
        b: Batch row.
        h: Query head.
        q: Query rows, int32 ``[M, 1]``; may lie outside the tensor.
        kv: Keys, int32 ``[1, N]``; may lie behind the tensor's last.
        first_key: A multiple of SPAN, not above any key.
        offset: Key position of query row 0.
        start: First valid key.
        end: One past the last valid key.
        q_len: Sq.
        kv_len: Skv.
        listed_ptr: Words of the caller's block mask of the batch row and head, int32 ``[nq', words]``; not read if
            LISTED_Q is 0.
        words: Words a row of blocks of the caller's block mask.
        AUX: What the mask_mod reads.
        CAUSAL: Whether a row sees keys up to its position only.
        MASK: The mask_mod, or None.
        LISTED_Q: Query rows a block of the caller's block mask; 0 without one.
        LISTED_K: Keys a block of the caller's block mask.
        SPAN: All keys are fewer than this many after `first_key`.
    """
    at = q + offset
    real = (at >= start) & (at < end) & (q >= 0) & (q < q_len)
    result = real & ((kv >= start) & (kv < end) & (kv < kv_len))
    if CAUSAL:
        result = result & (kv <= at)
    if (MASK is not None) or (LISTED_Q > 0):
        # Mods and words are read at rows and keys that there are.
        q = tl.minimum(tl.maximum(q, 0), q_len - 1)
        kv = tl.minimum(kv, kv_len - 1)
        result = result & allowed(b, h, q, kv, first_key, listed_ptr, words, AUX, MASK, LISTED_Q, LISTED_K, SPAN)
    return result


@triton.jit
def at_head(listed_ptr, b, h, stride_b, stride_h, LISTED_Q: tl.constexpr):
    """Pointer to the words of one batch row and head of the caller's block mask.

    Args:
        listed_ptr: The caller's block mask as bits, int32 ``[1 or B, 1 or Hs, nq', ceil(nk' / 32)]``; not read if
            LISTED_Q is 0.
        b: Batch row.
        h: Query head.
        stride_b: Words from batch row to batch row; 0 if all share them.
        stride_h: Words from head to head; 0 if all share them.
        LISTED_Q: Query rows a block of the caller's block mask; 0 without one.
    """
    if LISTED_Q > 0:
        listed_ptr += b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
    return listed_ptr


def mod_arguments(mod: tuple[object, tuple[object, ...]] | None) -> tuple[object, tuple[object, ...]]:
    """The jit function of a mod and what it reads; None and nothing where there is no mod."""
    return (None, ()) if mod is None else mod


def listed_arguments(spec: MaskSpec) -> tuple[Tensor, int, int, int]:
    """The caller's block mask as kernels take it: tensor, strides of batch row and head (0: shared), words a row.

    Where there is none, the bounds stand for it: Triton before 3.7 passes None to no function that returns it.
    """
    listed = spec.listed
    if listed is None:
        return spec.bounds, 0, 0, 0
    stride_b, stride_h = (0 if listed.shape[axis] == 1 else listed.stride(axis) for axis in (0, 1))
    return listed, stride_b, stride_h, listed.shape[3]
