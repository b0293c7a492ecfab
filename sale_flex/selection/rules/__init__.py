# SPDX-License-Identifier: BSD-3-Clause
"""Selection rules, a file each: options, range checks, codes, selection, and scores for calibration."""

from sale_flex.selection.rules.a_shape import AShape
from sale_flex.selection.rules.antidiagonal import Antidiagonal
from sale_flex.selection.rules.base import Rule, Selection, register_rule, rule_named, rule_names
from sale_flex.selection.rules.block_mean import BlockMean
from sale_flex.selection.rules.exact import Exact
from sale_flex.selection.rules.flexprefill import FlexPrefill
from sale_flex.selection.rules.mass import Mass
from sale_flex.selection.rules.relative import Relative
from sale_flex.selection.rules.top_k import TopK
from sale_flex.selection.rules.vertical_slash import VerticalSlash

__all__ = [
    "AShape",
    "Antidiagonal",
    "BlockMean",
    "Exact",
    "FlexPrefill",
    "Mass",
    "Relative",
    "Rule",
    "Selection",
    "TopK",
    "VerticalSlash",
    "register_rule",
    "rule_named",
    "rule_names",
]
