# SPDX-License-Identifier: BSD-3-Clause
"""On which families of models the choice of blocks was measured, and what `configure` says of the others."""

import logging
import warnings
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import torch

from sale_flex.config import SaleConfig
from sale_flex.selection.rules import Mass

logger = logging.getLogger(__name__)


class Measured(NamedTuple):
    """What is known of a family."""

    where: str
    """The checkpoints whose loss was compared with dense attention's (docs/decisions.md)."""
    harm: str | None
    """What `Mass.fast` does to them; None: nothing."""


MEASURED = {
    "llama": Measured("house-lm (24 M parameters, 32K tokens) and SmolLM2-135M (8K tokens)", None),
    "gemma3_text": Measured("Gemma 3 270M (32K tokens)", "raises the loss of Gemma 3 270M by 0.058"),
}
"""Type of a model's config -> what was measured."""

_UNKNOWN = Measured("", "was not measured on them")


def say_measured(model: torch.nn.Module, configs: Iterable[SaleConfig]) -> None:
    """Log at INFO, once a family, where its loss was measured; warn where moments are not known to be safe.

    Args:
        model: What is configured; a part without a config is of no family.
        configs: Of its layers.
    """
    config = getattr(model, "config", None)
    family = getattr(getattr(config, "get_text_config", lambda: config)(), "model_type", None)
    if not isinstance(family, str):
        return
    _log_once(family)
    averaged = any(isinstance(one.rule, Mass) and one.rule.averages for one in configs)
    harm = MEASURED.get(family, _UNKNOWN).harm
    if averaged and harm is not None:
        warnings.warn(
            f"estimating by moments (Mass.fast) is not known to be safe on models of type {family!r}: it {harm}. "
            "Compare the loss on your text with dense attention's, or take the default, Mass().",
            UserWarning,
            stacklevel=3,
        )


@cache
def _log_once(family: str) -> None:
    if family not in MEASURED:
        logger.info(
            "sale_flex was never measured on models of type %r (it was on %s): compare the loss on your text with "
            "dense attention's before you rely on it.",
            family,
            ", ".join(MEASURED),
        )
    else:
        logger.info("sale_flex was measured on models of type %r: %s.", family, MEASURED[family].where)
