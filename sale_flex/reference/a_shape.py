# SPDX-License-Identifier: BSD-3-Clause
"""A-shape: nothing but what is always kept, unless the threshold is 0."""

from typing import Any

import torch

from sale_flex.reference.call import Call
from sale_flex.reference.common import Choice


def a_shape_choice(call: Call, config: Any) -> Choice:
    """All candidates of heads with threshold 0, none of others."""
    heads = call.query.shape[1]
    threshold = torch.as_tensor(config.rule.threshold, device=call.query.device).expand(heads)[:, None, None]
    hit = call.candidate & (threshold == 0)
    return Choice(hit, torch.where(hit, torch.inf, -torch.inf), torch.zeros_like(hit))
