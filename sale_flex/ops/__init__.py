# SPDX-License-Identifier: BSD-3-Clause
"""The custom ops, a file per stage of a call; `define` says how they cross torch's dispatcher."""

from sale_flex.ops.codes import (
    key_mean,
    nonfinite_blocks,
    quantize_groups,
    quantize_moments,
    quantize_rows,
    query_bounds,
)
from sale_flex.ops.lists import attend_rows, attended, build_lists, kept_table
from sale_flex.ops.selection import audit_rows, last_row_sums, mass_hits, row_limits, scan_max
from sale_flex.ops.shares import antidiagonal_shares, block_mean_energies
from sale_flex.ops.structure import block_mask_bits, block_structure, candidate_blocks

__all__ = [
    "antidiagonal_shares",
    "attend_rows",
    "attended",
    "audit_rows",
    "block_mask_bits",
    "block_mean_energies",
    "block_structure",
    "build_lists",
    "candidate_blocks",
    "kept_table",
    "key_mean",
    "last_row_sums",
    "mass_hits",
    "nonfinite_blocks",
    "quantize_groups",
    "quantize_moments",
    "quantize_rows",
    "query_bounds",
    "row_limits",
    "scan_max",
]
