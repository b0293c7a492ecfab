# SPDX-License-Identifier: BSD-3-Clause
"""How far a correct kernel may be from exact arithmetic, derived and never tuned.

Two rules, for two purposes:

* `attention_error_bound` is a proof: no correct kernel that accumulates in float32 can be further off, whatever its
  tiles and its order of sums, so a test that uses it is never flaky. Worst cases add up in it, so it is several times
  what kernels really do.
* `low_precision_budget` is the rule of the FlashAttention tests: twice the error that a plain eager run in the same
  dtype makes, and a rounding band. It is tighter, and statistical: use it on tensors of some size.

Notation: u is the unit roundoff (half of ``torch.finfo(dtype).eps``), and a sum or dot product of n terms in any order
is off by at most ``gamma(n) * sum(|terms|)``, ``gamma(n) = n u / (1 - n u)`` (Higham, Accuracy and Stability of
Numerical Algorithms, section 3.1).
"""

import math

import torch
from torch import Tensor

from sale_flex.mods import ScoreMod
from sale_flex.reference import Moments, PooledRows, product_shift, quantize_rows, rotate, rotation_width
from sale_flex.testing.oracles import dense_attention


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to `dtype`."""
    return torch.finfo(dtype).eps / 2


def gamma(terms: int, dtype: torch.dtype = torch.float32) -> float:
    """Largest relative error that a chain of `terms` roundings to `dtype` makes."""
    error = terms * unit_roundoff(dtype)
    return error / (1 - error)


def logit_error_bound(query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
    """Largest error of a logit ``scale * q . k`` that is accumulated in float32, float64 ``[B, Hq, Sq, Skv]``.

    D products and their sum are D roundings; the scale, and a factor log2(e) for exp2, two more.
    """
    dim = query.shape[3]
    key = key.double().abs().repeat_interleave(query.shape[1] // key.shape[1], 1)
    size = query.double().abs() @ key.transpose(-1, -2) * (dim**-0.5 if scale is None else scale)
    return size * gamma(dim + 2)


def attention_error_bound(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """Largest error of attention in the inputs' dtype with float32 accumulation, float64 ``[B, Hq, Sq, D]``.

    With weights p and values v, exact output ``o = sum p v``, and ``A = sum p |v|`` (an upper bound of o in magnitude):

    * An error e in every logit multiplies numerator and denominator by at most exp(e) each: ``expm1(2 e) A``. e is
      `logit_error_bound`, and 16 u of the largest logit for the running maximum: subtracting it from logits, and
      subtracting maxima from each other, tile after tile, in sums that telescope.
    * Two sums over n keys, exp itself, and a rescaling of both per tile of at least 16 keys: ``gamma(3 n + 32) A``.
    * In 16 bits the weights are rounded before they meet the values, and the output once more: ``2 u A`` with the u of
      that dtype; a weight below the smallest number of the dtype may vanish: ``sum |v|`` times that number.

    Args:
        query: ``[B, Hq, Sq, D]``, finite.
        key: ``[B, Hkv, Skv, D]``, finite.
        value: ``[B, Hkv, Skv, D]``, finite.
        mask: bool, broadcastable to ``[B, Hq, Sq, Skv]``.
        scale: Softmax scale; by default ``D ** -0.5``.
    """
    logits = logit_error_bound(query, key, scale)
    seen = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask.expand_as(logits)
    largest = logits.masked_fill(~seen, 0.0).amax(-1, keepdim=True)
    # Every logit is at most its own error bound divided by gamma(D + 2).
    error = largest * (1 + gamma(16) / gamma(query.shape[3] + 2))
    mass = dense_attention(query, key, value.abs(), mask, scale=scale)
    relative = torch.expm1(2 * error) + gamma(3 * key.shape[2] + 32)
    dtype = query.dtype
    if dtype == torch.float32:
        return mass * relative
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    total = seen.double() @ value.double().abs().repeat_interleave(query.shape[1] // value.shape[1], 1)
    return mass * (relative + 2 * unit_roundoff(dtype)) + smallest * total


def rounding_band(exact: Tensor, dtype: torch.dtype) -> float:
    """Twice the largest change that adding and subtracting 0.3 makes in `dtype`: some roundings of typical outputs."""
    rounded = exact.to(dtype)
    return 2 * float((rounded + 0.3 - 0.3 - rounded).abs().max())


def low_precision_budget(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
) -> tuple[Tensor, float]:
    """The exact output, float64 ``[B, Hq, Sq, D]``, and the largest error a kernel may show anywhere.

    The budget is twice the largest error of the same dense computation, run eagerly in the inputs' dtype, plus
    `rounding_band`: the rule of the FlashAttention tests. The eager run knows nothing of the kernel under test.
    """
    exact = dense_attention(query, key, value, mask, score_mod=score_mod, scale=scale)
    eager = dense_attention(query, key, value, mask, score_mod=score_mod, scale=scale, dtype=query.dtype)
    return exact, 2 * float((eager.double() - exact).abs().max()) + rounding_band(exact, query.dtype)


def assert_attention_close(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, scale: float | None = None
) -> None:
    """Assert that a kernel's output is attention over the mask, up to `attention_error_bound`.

    Args:
        output: ``[B, Hq, Sq, D]`` from the kernel under test.
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``.
        value: ``[B, Hkv, Skv, D]``.
        mask: bool, broadcastable to ``[B, Hq, Sq, Skv]``; None shows everything.
        scale: Softmax scale; by default ``D ** -0.5``.

    Raises:
        AssertionError: Shape or dtype differ from the query's, or an element is further off than the bound.
    """
    assert output.shape == query.shape, f"shape {list(output.shape)} instead of {list(query.shape)}"
    assert output.dtype == query.dtype, f"{output.dtype} instead of {query.dtype}"
    exact = dense_attention(query, key, value, mask, scale=scale)
    bound = attention_error_bound(query, key, value, mask, scale=scale)
    error = (output.double() - exact).abs()
    wrong = ~(error <= bound)  # negated: NaN is wrong
    if bool(wrong.any()):
        at = wrong.nonzero()[0].tolist()
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements are off by more than rounding explains, for instance at "
            f"(batch, head, query, channel) {at}: got {float(output[tuple(at)]):.6g}, exact "
            f"{float(exact[tuple(at)]):.6g}, allowed error {float(bound[tuple(at)]):.2g}"
        )


def code_error_bound(bits: int) -> float:
    """How far ``code * scale`` may be from the number it stands for, in scales: a half, and three roundings.

    Rounded are the scale, its inverse and the product with it, each times a code of at most ``2 ** (bits - 1) - 1``.
    """
    return 0.5 + (2 ** (bits - 1) - 1) * gamma(3)


def estimate_error_bound(
    query: Tensor, query_scale: Tensor, key: Tensor, key_scale: Tensor, scale: float, bits: int
) -> Tensor:
    """Largest distance between a logit estimated from codes and the exact one, float64 ``[B, Hq, Sq, Skv]``.

    With ``q = q' + a`` and ``k = k' + b``, ``q . k - q' . k' = q . b + a . k - a . b``, and every channel of a and b is
    at most half a scale: ``scale * (s_k |q| / 2 + s_q |k| / 2 + D s_q s_k / 4)`` with sums of magnitudes.

    Args:
        query: ``[B, Hq, Sq, D]``.
        query_scale: ``[B, Hq, Sq]``.
        key: ``[B, Hkv, Skv, D]``, smoothed if the codes are of smoothed keys.
        key_scale: ``[B, Hkv, Skv]``, the scale of every key.
        scale: Softmax scale.
        bits: Width of the codes.
    """
    group = query.shape[1] // key.shape[1]
    half = code_error_bound(bits)
    q_error = query_scale.double()[..., None] * half  # [B, Hq, Sq, 1]
    k_error = key_scale.double().repeat_interleave(group, 1)[:, :, None] * half  # [B, Hq, 1, Skv]
    q_size = query.double().abs().sum(-1, keepdim=True)
    k_size = key.double().abs().sum(-1).repeat_interleave(group, 1)[:, :, None]
    return scale * (q_size * k_error + q_error * k_size + query.shape[3] * q_error * k_error)


def mass_error_bound(query: Tensor, key: Tensor, scale: float | None = None) -> float:
    """How far from a threshold float32 may move a block of the mass rule, in nats: ``within`` of `assert_same_blocks`.

    Given the codes, implementations share every integer but one per row: the fixed-point logarithm of the row's exact
    part L, which moves all of the row's sums alike. With logits off by e nats, from exact ones:

    * ln L is off by e and ``gamma(n + 32)`` for n exponentials and their sum. e is twice `logit_error_bound`, of the
      keys and of their mean, and 16 u of the largest logit for the running maximum (see `attention_error_bound`).
    * In octaves: log2(e) times that, rounding the logarithm and its distance from the bias, and two roundings to
      2 ** -16 that may fall apart.
    * An exponential is 1 + f where 2 ** f is meant, so an octave of logarithm is at most 1 nat of its value.
    * Sums over keys and blocks, the total, the cut: ``gamma(2 n + 8)``.

    Args:
        query: ``[B, Hq, Sq, D]``; elements that are not finite count as 0.
        key: ``[B, Hkv, Skv, D]``, likewise.
        scale: Softmax scale; by default ``D ** -0.5``.
    """
    query, key = (torch.where(x.isfinite(), x, 0.0) for x in (query, key))
    keys = key.shape[2]
    error = 2 * float(logit_error_bound(query, key, scale).max())
    largest = error / gamma(query.shape[3] + 2)
    nats = error + largest * gamma(16) + gamma(keys + 32)
    octaves = nats / math.log(2) + gamma(4) * (largest / math.log(2) + math.log2(keys) + 150) + 2**-16
    return octaves + gamma(2 * keys + 8)


def moment_error_bound(
    pooled: PooledRows, mu: Tensor, var: Tensor, moments: Moments, scale: float, bits: int
) -> Tensor:
    """Largest error of a sub-block's estimated logit for being coded, in nats, float64 ``[B, Hq, np, nk * n_sub]``.

    That is, the distance between the logarithm of what `reference.row_masses` sums up for a sub-block and
    `reference.moment_logits` in exact arithmetic, in units of the row's exact part, where neither is cut off: from 0 to
    100 octaves, and logits below some thousands. With codes c and d, scales s and t:

    * The mean logit: `estimate_error_bound`.
    * The variance: ``scale ** 2 / 2 * (sum q^2 e + E v + E e)`` for variances v off by e and squares q^2 off by E. With
      q off by a, ``E = 2 |q| a + a^2``; 8-bit squares lose another 64 ``s ** 2`` to fit a byte.
    * Of single keys, a rotation in float32: `_rotation_error` in rows and keys.
    * 8-bit products are shortened: half of what may be lost, either way, is rounded to a step of 2 ** -16 octaves.
    * A product's factor in fixed point is off by half a step and four roundings.
    * Moments of up to 64 keys are computed in float32: ``gamma(136)`` of the root mean square, or of its square.
    * The row's logarithm, the cap and the sum of terms: a step each.
    * The straight mantissa is within 0.0431 octaves of the exponential.

    Args:
        pooled: From `reference.pool_rows`.
        mu: float64 ``[B, Hkv, nk * n_sub, D]`` from `reference.key_moments`.
        var: Likewise, 0 for sub-blocks of one key.
        moments: From `reference.quantize_moments`.
        scale: Softmax scale.
        bits: Width of the codes.
    """
    group = pooled.rows.shape[1] // mu.shape[1]
    subs = mu.shape[2] // moments.mean_scale.shape[2]
    step = 2**-16 * math.log(2)
    scanned = not moments.var_codes.shape[2]
    rows, width = pooled.rows.double(), rotation_width(mu.shape[3]) if scanned else 1
    codes, row_scale = quantize_rows(rotate(pooled.rows) if scanned else pooled.rows, bits)
    codes, per_row = codes.double(), row_scale.double()[..., None]
    square = mu.square() + var  # of the keys, averaged

    def of_rows(x: Tensor) -> Tensor:
        return x.repeat_interleave(group, 1).transpose(-1, -2)

    def fixed_point(product: Tensor, unit: Tensor) -> Tensor:
        if bits == 4:
            return product * (step / 2 + gamma(4) * unit)
        lost = 2.0 ** product_shift((unit / step).float())
        return product * (step / (2 * lost) + gamma(4) * unit) + lost / 2 * unit + step / 2

    mean_scale = moments.mean_scale.repeat_interleave(subs, 2)
    unit = scale / width * per_row * mean_scale.double().repeat_interleave(group, 1)[:, :, None]
    bound = scale * rows.abs() @ of_rows(square.sqrt() * gamma(136))
    if scanned:
        turned, of_keys = rotate(rows), rotate(mu)
        bound = bound + estimate_error_bound(turned, row_scale, of_keys, mean_scale, scale / width, bits)
        row_error, key_error = _rotation_error(rows), of_rows(_rotation_error(mu))
        bound = bound + scale / width * (row_error @ (of_rows(of_keys.abs()) + key_error) + turned.abs() @ key_error)
    else:
        bound = bound + estimate_error_bound(rows, row_scale, mu, mean_scale, scale, bits)
    bound = bound + fixed_point((codes @ of_rows(moments.mean_codes.double())).abs(), unit)
    if not scanned:
        top, square_unit = (15, 1) if bits == 4 else (127, 128)
        squares = codes.square() if bits == 4 else (codes.square() + 64).div(128).floor()
        row_error = code_error_bound(bits) * per_row
        square_error = 2 * rows.abs() * row_error + row_error**2 + (64 * per_row**2 if bits == 8 else 0)
        var_scale = moments.var_scale.double().repeat_interleave(subs, 2)
        var_error = (0.5 + top * gamma(3)) * var_scale[..., None] + gamma(136) * square
        second = rows.square() @ of_rows(var_error) + square_error @ of_rows(var + var_error)
        unit = scale * scale / 2 * square_unit * per_row**2 * var_scale.repeat_interleave(group, 1)[:, :, None]
        bound = bound + scale * scale / 2 * second
        bound = bound + fixed_point(squares @ of_rows(moments.var_codes.double()), unit)
    return bound + 3 * step + 0.0431 * math.log(2)


def _rotation_error(x: Tensor) -> Tensor:
    """How far float32 may be from the exact `rotate`: a rounding a stage, of sums below the block's of magnitudes."""
    width = rotation_width(x.shape[-1])
    size = x.abs().unflatten(-1, (-1, width)).sum(-1, keepdim=True).expand(*x.shape[:-1], -1, width).flatten(-2)
    return size * gamma(width.bit_length() - 1)
