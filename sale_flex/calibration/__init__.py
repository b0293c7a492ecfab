# SPDX-License-Identifier: BSD-3-Clause
"""Thresholds per layer and head: searched on texts against dense attention, kept in two small files."""

from sale_flex.calibration.artefact import Calibration
from sale_flex.calibration.evaluation import Evaluation, Text
from sale_flex.calibration.run import calibrate, evaluate

__all__ = ["Calibration", "Evaluation", "Text", "calibrate", "evaluate"]
