# SPDX-License-Identifier: BSD-3-Clause
"""Kept bits as a flat table; see `sale_flex.kernels.lookup` for the contract."""

import torch
from torch import Tensor


def kept_table(kept: Tensor, block_q: int, block_k: int, table_words: int) -> tuple[Tensor, Tensor]:
    """The table int32 ``[table_words]``, and its layout int32 ``[5]``."""
    table = kept.new_zeros(table_words)
    table[: kept.numel()] = kept.flatten()
    strides = [0 if size == 1 else stride for size, stride in zip(kept.shape[:3], kept.stride())]
    numbers = (*strides, block_q.bit_length() - 1, block_k.bit_length() - 1)
    return table, torch.tensor(numbers, dtype=torch.int32, device=kept.device)
