# SPDX-License-Identifier: BSD-3-Clause
"""Shares of a softmax, block by block, as thresholds: what rules after several papers have in common."""

from torch import Tensor


def covering(shares: Tensor) -> Tensor:
    """Scores of the fewest blocks that add up: those of t or more, largest first, leave out a share of t at most.

    A block's score is 1 less the sum of all larger shares of its row; of equal shares the first block counts as larger.
    So the blocks that "add up to p" in a paper are those whose score exceeds 1 - p.

    Args:
        shares: float32 ``[..., nk]``, 0 or more; those of a row add up to 1 at most.

    Returns:
        float32 ``[..., nk]``, in [0, 1]; the largest share's is 1.
    """
    shares, order = shares.sort(dim=-1, descending=True, stable=True)
    before = shares.cumsum(-1) - shares
    return shares.new_empty(shares.shape).scatter_(-1, order, (1 - before).clamp(0, 1))
