# SPDX-License-Identifier: BSD-3-Clause
"""The full-resolution scan in tiles of query rows; see `sale_flex.kernels.scan` for the contract.

Products of codes are taken in float32, where they are exact: at most 127 * 127 * 256 < 2**24.
"""

import torch
from torch import Tensor

from sale_flex.blocks.bits import pack_bits
from sale_flex.blocks.geometry import Grid

TILE_ELEMENTS = 2**24
"""Products held at once, per KV head: 64 MiB."""


def scan_max(
    query_codes: Tensor,
    limit: Tensor,
    key_codes: Tensor,
    key_scale: Tensor,
    bounds: Tensor,
    q_len: int,
    kv_len: int,
    block_q: int,
    block_k: int,
    local_tokens: int,
    from_zero: bool,
) -> Tensor:
    """Hit bits int32 ``[B, Hq, nq, ceil(nk / 32)]`` of every block before a row's local window.

    `from_zero` is a promise that only the kernel makes use of.
    """
    batch, heads = query_codes.shape[:2]
    kv_heads = key_codes.shape[1]
    grid = Grid(q_len, kv_len, block_q, block_k)
    hits = torch.zeros(batch, heads, grid.query_blocks, grid.words, dtype=torch.int32, device=limit.device)
    for b, (offset, start, end) in enumerate(bounds.tolist()):
        for kv_head in range(kv_heads):
            keys = key_codes[b, kv_head].float().T
            shared = slice(kv_head * (heads // kv_heads), (kv_head + 1) * (heads // kv_heads))
            rows = max(1, TILE_ELEMENTS // (kv_len * (heads // kv_heads) * block_q)) * block_q
            for row in range(0, q_len, rows):
                last = min(row + rows, q_len) - 1
                last_block = max(offset + last - last % block_q, start)
                stop = min(max(last_block - local_tokens + 1, 0) // block_k, -(-end // block_k))
                if stop <= start // block_k or offset + last < start or offset + row >= end:
                    continue
                tile = slice(row, row + rows)
                product = query_codes[b, shared, tile].float() @ keys[:, : stop * block_k]  # [G, M, stop * block_k]
                blocks = product.unflatten(-1, (stop, block_k))
                hit = _reach(blocks, limit[b, shared, tile], key_scale[b, kv_head], start, block_k)
                # Codes are padded to more rows than there are blocks.
                hit = hit.unflatten(1, (-1, block_q)).any(2)[:, : grid.query_blocks - row // block_q]
                words = pack_bits(hit)
                hits[b, shared, row // block_q : row // block_q + hit.shape[1], : words.shape[-1]] = words
    return hits


def _reach(blocks: Tensor, limit: Tensor, scale: Tensor, start: int, block_k: int) -> Tensor:
    """Whether row m's largest product in a block, times the key scale, reaches its limit, bool ``[G, M, nk]``.

    A first valid key inside a block cuts every block in two: the columns before the cut belong to the previous group.
    """
    first_group = start // block_k
    cut = start % block_k
    group = torch.arange(blocks.shape[2], device=blocks.device) - first_group
    hit = (group >= 0) & ~(blocks[..., cut:].amax(-1) * scale[group.clamp_min(0)] < limit[..., None])
    if cut:
        hit |= (group >= 1) & ~(blocks[..., :cut].amax(-1) * scale[(group - 1).clamp_min(0)] < limit[..., None])
    return hit
