# SPDX-License-Identifier: BSD-3-Clause
"""SALE sparse attention for PyTorch: a 4-bit estimate chooses blocks, FlexAttention attends to them."""

from sale_flex import mods as mods
from sale_flex.attention import AuxOutput, AuxRequest, sale_attention
from sale_flex.block_mask import MaskResult, create_sale_block_mask
from sale_flex.blocks.packing import pack_int4, unpack_int4
from sale_flex.calibration import Calibration, calibrate
from sale_flex.call.facts import Call
from sale_flex.config import SaleConfig
from sale_flex.flex.run import flex_kernel_options
from sale_flex.kernels.arguments import Structure
from sale_flex.selection.key_codes import KeyCodes
from sale_flex.selection.rules import (
    Antidiagonal,
    AShape,
    BlockMean,
    Exact,
    FlexPrefill,
    Mass,
    Relative,
    Rule,
    Selection,
    TopK,
    VerticalSlash,
    register_rule,
)
from sale_flex.stats import Audit, Path, SaleStats

__version__ = "0.1.0"

__all__ = [
    "AShape",
    "Antidiagonal",
    "Audit",
    "AuxOutput",
    "AuxRequest",
    "BlockMean",
    "Calibration",
    "Call",
    "Exact",
    "FlexPrefill",
    "KeyCodes",
    "MaskResult",
    "Mass",
    "Path",
    "Relative",
    "Rule",
    "SaleConfig",
    "SaleStats",
    "Selection",
    "Structure",
    "TopK",
    "VerticalSlash",
    "__version__",
    "calibrate",
    "create_sale_block_mask",
    "flex_kernel_options",
    "pack_int4",
    "register_rule",
    "sale_attention",
    "unpack_int4",
]
