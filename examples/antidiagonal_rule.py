# SPDX-License-Identifier: BSD-3-Clause
"""A selection rule of one's own in plain torch: sums along antidiagonals, after XAttention (arXiv 2503.16428, 2.1).

Every `stride` rows meet every `stride` keys in one product: the sum of the logits on an antidiagonal of their square,
which crosses every vertical and every slash in it. A block's score is its share of the softmax over such sums. The
paper keeps the fewest blocks that add up to a share; here, as in every rule of sale_flex, each block is compared with
the threshold.

    python examples/antidiagonal_rule.py --length 4096
"""

import argparse
import sys
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

import sale_flex
from sale_flex.testing import Shape, structured_inputs


@sale_flex.register_rule
@dataclass(frozen=True, eq=False)
class Antidiagonal(sale_flex.Rule):
    """Keep a block whose antidiagonal sums take `threshold` or more of its rows' softmax. Materialises all sums."""

    threshold: float | Tensor = 0.01
    stride: int = 8
    """Rows, and keys, that one sum stands for: a divisor of a block's."""

    name: ClassVar[str] = "my_antidiagonal"

    def check_blocks(self, block_size: tuple[int, int]) -> None:
        """Raise ValueError if a sum would reach over the border of a block."""
        if any(size % self.stride for size in block_size):
            raise ValueError(f"stride must divide the blocks' {block_size} rows and keys, got {self.stride}.")

    def scores(self, call: sale_flex.Call, structure: sale_flex.Structure | None = None) -> Tensor:
        """Shares of the softmax, float32 ``[B, Hq, nq, nk]``."""
        grid, size = call.grid, self.stride
        query = pad(call.query.float(), (0, 0, 0, grid.query_blocks * grid.block_q - grid.q_len))
        at = torch.arange(grid.kv_len, device=query.device)
        valid = (at >= call.bounds[:, 1, None]) & (at < call.bounds[:, 2, None])  # [B, Skv]
        key = call.key.float().masked_fill(~valid[:, None, :, None], 0.0)
        key = pad(key, (0, 0, 0, grid.key_blocks * grid.block_k - grid.kv_len))
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        rows = query.unflatten(2, (-1, size)).flip(3).flatten(3)  # [B, Hq, rows / stride, stride * D]
        columns = key.unflatten(2, (-1, size)).flatten(3)
        seen = call.visible_blocks(structure)
        seen = seen.repeat_interleave(grid.block_q // size, 2).repeat_interleave(grid.block_k // size, 3)
        sums = (rows @ columns.mT * (call.scale / size)).masked_fill(~seen, -torch.inf)
        shares = sums.softmax(-1).nan_to_num()  # a row of padding sees nothing
        return shares.unflatten(-1, (-1, grid.block_k // size)).sum(-1).unflatten(2, (grid.query_blocks, -1)).mean(3)


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    """Print what the rule keeps beside the default."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int, default=2048, help="tokens")
    args = parser.parse_args(arguments)
    query, key, value = structured_inputs(Shape(args.length, args.length, heads=4, kv_heads=2, head_dim=64))
    for rule in (Antidiagonal(), sale_flex.Mass()):
        config = sale_flex.SaleConfig(rule, min_length=256)
        wanted = sale_flex.AuxRequest(stats=True)
        _, aux = sale_flex.sale_attention(query, key, value, config, return_aux=wanted)
        missed = aux.stats.audit.miss.max()
        print(f"{rule.describe()}: density {aux.stats.density.mean():.3f}, the worst head missed {missed:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
