# SPDX-License-Identifier: BSD-3-Clause
"""Selection rules, a file each: options, range checks, codes, selection, and scores for calibration."""

from sale_flex.selection.rules.base import Rule, Selection, register_rule, rule_named, rule_names
from sale_flex.selection.rules.flexprefill import FlexPrefill
from sale_flex.selection.rules.mass import Mass
from sale_flex.selection.rules.relative import Relative

__all__ = ["FlexPrefill", "Mass", "Relative", "Rule", "Selection", "register_rule", "rule_named", "rule_names"]
