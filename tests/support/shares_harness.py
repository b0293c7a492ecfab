# SPDX-License-Identifier: BSD-3-Clause
"""What tests of rules that compare shares of blocks have in common: scores, and how far float32 may be off."""

import math
from typing import Any, NamedTuple

import torch
from rules_harness import scores
from torch import Tensor

from sale_flex import SaleConfig, reference
from sale_flex.testing import Inputs, Shape
from sale_flex.testing.tolerances import gamma


class Scored(NamedTuple):
    """What a rule says of a call's blocks, and what the reference knows of the call."""

    scores: Tensor
    """float32 ``[B, Hq, nq, nk]``."""
    of: Any
    """`reference.Call`, in float64."""


def scored(inputs: Inputs, shape: Shape, config: SaleConfig, **options: Any) -> Scored:
    """Scores of a call's blocks under mods as `sale_attention` takes them."""
    where = shape.positions()
    of = reference.make_call(inputs.query, inputs.key, config, **where, **options, dtype=torch.float64)
    return Scored(scores(inputs, config, where, **options), of)


def sum_error_bound(of: Any, stride: int) -> float:
    """Largest error of an antidiagonal sum in float32, less its row's largest one.

    A sum over stride * D products, the scale, the difference and an exponential: so many roundings of at most twice the
    largest sum of magnitudes, which is averaged over `stride` products.
    """
    return 2 * _largest_logit(of) * gamma(stride * of.query.shape[3] + 8)


def mean_error_bound(of: Any, block_k: int) -> float:
    """The same of a row's logit with a mean key, which is a sum of `block_k` and rounded to the keys' dtype.

    Where sums differ in float32, that rounding may go either way: a whole step.
    """
    step = torch.finfo(of.key.dtype).eps
    return 2 * _largest_logit(of) * (gamma(of.query.shape[3] + block_k + 8) + 1.01 * step)


def share_error_bound(error: float, terms: int) -> float:
    """Relative error of a share: exponentials above and below are off by `error` in the exponent, sums by roundings."""
    return math.expm1(2 * error) + gamma(2 * terms + 32)


def _largest_logit(of: Any) -> float:
    """Largest sum of magnitudes of a row's and a key's products, scaled."""
    query, key = (torch.where(x.isfinite(), x, 0.0).double().norm(dim=-1).amax() for x in (of.query, of.key))
    return of.scale * float(query * key)
