# SPDX-License-Identifier: BSD-3-Clause
"""Attention sinks that are logits, not tokens (gpt-oss), and the log-sum-exp that they are applied from."""

import torch
from torch import Tensor

from sale_flex import listed_ops
from sale_flex.sight import Mod, Sight
from sale_flex.user_mods import UserMods, see_mods


def check_sinks(sink_logits: Tensor, query: Tensor) -> None:
    """Raise TypeError or ValueError if there is not one logit per query head."""
    if not isinstance(sink_logits, Tensor):
        raise TypeError(f"sink_logits must be a tensor of shape [{query.shape[1]}], got {type(sink_logits).__name__}.")
    if sink_logits.shape != (query.shape[1],) or not sink_logits.is_floating_point():
        raise ValueError(
            f"sink_logits must be floating-point and have shape [{query.shape[1]}], one per query head, got shape "
            f"{list(sink_logits.shape)} and dtype {sink_logits.dtype}."
        )
    if sink_logits.device != query.device:
        raise ValueError(f"sink_logits must be on the query's device {query.device}, got {sink_logits.device}.")


def with_sinks(output: Tensor, lse: Tensor, sink_logits: Tensor) -> Tensor:
    """Output ``[B, Hq, Sq, D]`` of a softmax in which each head's sink takes part: ``1 / (1 + exp(sink - lse))`` of it.

    Args:
        output: Without the sink.
        lse: float32 ``[B, Hq, Sq]``, natural logarithm, without the sink.
        sink_logits: ``[Hq]``.
    """
    share = torch.sigmoid(lse - sink_logits.float()[:, None])
    return output * share[..., None].to(output.dtype)


def attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    mods: UserMods,
    bounds: Tensor,
    block_size: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of attention on kept blocks, in plain torch on a CPU, a range of rows at a time."""
    if mods.plain:
        sight, score = Sight(bounds, True, "", (), None, 1, 1), Mod()
    else:
        # Attention always applies the mods, whatever the estimate does.
        seen = see_mods(mods._replace(estimate="apply"), query, key, bounds, " with a log-sum-exp on a CPU")
        sight, score = seen.sight, seen.score
    output, lse = listed_ops.listed_rows(query, key, value, kept, *sight, *score, scale, *block_size)
    return output, lse
