# SPDX-License-Identifier: BSD-3-Clause
"""The audit fires on heads of real models whose choice is known to be wrong, and on no other (docs/results/trust.json).

tests/data holds one head of each model: the last 1,024 queries of a prefix of a Python text, and all its keys, bf16.
"""

import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from sale_flex import SaleConfig, create_sale_block_mask

ROOT = Path(__file__).resolve().parents[1]
FAST = SaleConfig.fast(min_length=256)
DEFAULT = SaleConfig(min_length=256)
MEANS = SaleConfig(threshold=0.005, query_stride=None, query_pool=4, bits=4, min_length=256)
PUBLISHED = SaleConfig(metric="relative", threshold=0.004, bits=4, min_length=256)


def miss_of(model: str, config: SaleConfig, **options) -> float:
    made = torch.load(ROOT / "tests" / "data" / f"{model}.pt")
    query, key = made["query"], made["key"]
    return float(
        create_sale_block_mask(query, key, config, scale=made["scale"], stats=True, **options).stats.audit.miss
    )


@pytest.mark.parametrize(
    ("model", "config"),
    [("gemma3-270m", FAST), ("smollm2-135m", MEANS)],
    ids=["moments on Gemma", "means of queries on SmolLM2"],
)
def test_it_fires_for_what_ruins_a_model(model, config):
    # +.058 and +.033 on the model's loss.
    assert miss_of(model, config) > config.miss_bound
    assert miss_of(model, config, mask_mod=lambda b, h, q, kv: kv >= 0) > config.miss_bound


@pytest.mark.parametrize(
    ("model", "config"),
    [
        *((model, config) for model in ("house-lm", "smollm2-135m", "gemma3-270m") for config in (DEFAULT, PUBLISHED)),
        ("house-lm", FAST),
        ("smollm2-135m", FAST),
        ("house-lm", MEANS),
    ],
)
def test_it_is_silent_for_what_does_not(model, config):
    assert miss_of(model, config) < config.miss_bound / 2


def test_acting_on_it_brings_the_head_back():
    acting = SaleConfig.fast(min_length=256, on_miss="dense")
    made = torch.load(ROOT / "tests" / "data" / "gemma3-270m.pt")
    stats = create_sale_block_mask(made["query"], made["key"], acting, scale=made["scale"], stats=True).stats
    assert stats.audit.made_dense.all()
    assert (stats.density == 1).all()


def rank(values: torch.Tensor) -> torch.Tensor:
    """Ranks, ties sharing their mean."""
    return (values[:, None] > values).double().sum(1) + ((values[:, None] == values).double().sum(1) - 1) / 2


def test_it_orders_configurations_by_what_they_lose():
    rows = json.loads((ROOT / "docs" / "results" / "trust.json").read_text())["rows"]
    rises, masses = defaultdict(list), defaultdict(list)
    for row in rows:
        # Rules that switched on these very rows took away what the audit would have seen.
        if row.get("missed") and "where an asked row" not in row["rule"]:
            name = row["model"], row["rule"], row.get("threshold")
            rises[name].append(row["rise"])
            wanted = torch.tensor(row["wanted"])
            masses[name].append(torch.stack([torch.tensor(row["missed"]) * wanted, wanted]))
    assert len(rises) >= 20
    assert len({model for model, _, _ in rises}) == 3
    # The worst head, each of them over all sequences.
    summed = [torch.stack(masses[name]).sum(0) for name in rises]
    worst = torch.tensor([float((squares / wanted).nan_to_num(0.0).max()) for squares, wanted in summed])
    rise = torch.tensor([sum(rises[name]) / len(rises[name]) for name in rises])
    assert float(torch.corrcoef(torch.stack([rank(worst), rank(rise)]))[0, 1]) > 0.8
