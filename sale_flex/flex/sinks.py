# SPDX-License-Identifier: BSD-3-Clause
"""Attention sinks that are logits, not tokens (gpt-oss), and the log-sum-exp that they are applied from."""

import torch
from torch import Tensor

from sale_flex import ops
from sale_flex.call.facts import Call
from sale_flex.call.user_mods import read_mods


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


def attend_rows(call: Call, value: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of attention on kept blocks, in plain torch on a CPU, a range of rows at a time.

    Args:
        call: The call.
        value: ``[B, Hkv, Skv, D]``.
        kept: int32 ``[B, Hq, nq, ceil(nk / 32)]``: bits of the blocks.
    """
    query, key, spec, score = call.query, call.key, call.spec, call.score
    if call.masked is not None and call.mods.estimate == "ignore":
        # Attention applies the mods that the estimate leaves out.
        every = call.mods._replace(estimate="apply")
        applied = read_mods(every, query, key, call.bounds, " with a log-sum-exp on a CPU")
        spec, score = applied.spec, applied.score
    return ops.attend_rows(query, key, value, kept, spec, score, call.scale, call.grid)
