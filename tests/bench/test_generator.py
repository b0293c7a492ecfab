# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark's synthetic tensors: that they have the structure they promise."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sale_flex
from sale_flex.bench.configs import NAMED
from sale_flex.bench.generator import generate
from sale_flex.testing import block_map

LENGTH = 2048


def logits(made, head: int, kv_head: int) -> torch.Tensor:
    """Causal logits of one head in float64, ``[S, S]``."""
    scores = made.query[0, head].double() @ made.key[0, kv_head].double().T * made.key.shape[3] ** -0.5
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)


@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_the_parts_are_there(head_dim):
    made = generate(LENGTH, 4, 2, head_dim)
    assert made.query.shape == (1, 4, LENGTH, head_dim)
    assert made.key.shape == made.value.shape == (1, 2, LENGTH, head_dim)
    for head in range(4):
        scores = logits(made, head, head // 2)
        assert scores[:, 0].mean() > 6  # the sink
        at = torch.arange(LENGTH)
        near, far = scores[at, at][1:].mean(), scores[at[1000:], at[1000:] - 800].mean()
        assert near > far + 2  # the local decay
        rows = (made.needles[0, head] >= 0).nonzero().flatten()
        assert len(rows) == pytest.approx(LENGTH / 64, rel=0.5)
        needles = made.needles[0, head, rows].long()
        assert bool((needles <= rows).all())
        found = scores[rows, needles]
        others = scores[rows].masked_fill(scores[rows].isinf(), 0).mean(1)
        assert (found - others).mean() > 7


def test_whole_stretches_matter_to_each_other():
    made = generate(4096, 1, 1, 128, seed=3)
    mass = logits(made, 0, 0).softmax(-1)
    blocks = mass[:, 64:].unflatten(1, (-1, 64)).sum(-1)  # past the sink's
    # Blocks with a fiftieth of a row's probability, none of whose keys has a tenth of it: what no maximum finds.
    diffuse = (blocks > 0.02) & (mass[:, 64:].unflatten(1, (-1, 64)).amax(-1) < 0.1 * blocks)
    assert diffuse.float().mean() > 0.02


def test_density_of_the_default_rule_is_well_below_one():
    made = generate(4096, 4, 2, 128)
    config = replace(NAMED["fast"], min_length=256)
    mask = sale_flex.create_sale_block_mask(made.query, made.key, config)
    kept = block_map(mask).kept
    seen = torch.ones(64, 64, dtype=torch.bool).tril()
    assert 0.05 < kept.sum() / (4 * seen.sum()) < 0.7


def test_a_seed_is_a_call():
    one, two, other = (generate(300, 2, 1, 64, batch=2, seed=seed, outliers=2) for seed in (5, 5, 6))
    for mine, same, differs in zip(one, two, other):
        assert torch.equal(mine, same)
        assert not torch.equal(mine, differs)
    assert not torch.equal(one.query[0], one.query[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outlier_channels_are_as_promised(dtype):
    made = generate(LENGTH, 4, 2, 128, outliers=4, dtype=dtype)
    assert made.outliers.shape == (1, 2, 4)
    for kv_head in range(2):
        key, chosen = made.key[0, kv_head].double(), made.outliers[0, kv_head]
        assert len(chosen.unique()) == 4
        plain = torch.ones(128, dtype=torch.bool)
        plain[chosen] = False
        size = key.square().mean(0).sqrt()
        usual = key[:, plain].square().mean().sqrt()
        torch.testing.assert_close(
            size[chosen] / usual, torch.logspace(1.69897, 1.30103, 4).double(), rtol=1e-2, atol=0
        )
        assert size[plain].max() < 5 * usual
        assert bool((key.mean(0)[chosen].abs() > 0.95 * size[chosen]).all())
        torch.testing.assert_close(key.std(0)[chosen], size[chosen] / 8, rtol=2e-2, atol=0)


def test_outliers_leave_attention_alone():
    plain, spiked = (generate(LENGTH, 2, 1, 64, outliers=count) for count in (0, 4))
    assert torch.equal(plain.needles, spiked.needles)
    assert torch.equal(plain.value, spiked.value)
    for head in range(2):
        difference = logits(plain, head, 0) - logits(spiked, head, 0)
        seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        shift = difference[:, :1]  # the same for all keys of a row
        assert difference.sub(shift)[seen].abs().max() < 1e-4
        assert shift.abs().mean() > 0.1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((100, 3, 2, 64), "heads a multiple of kv_heads"),
        ((0, 1, 1, 64), "length, heads, kv_heads and batch must be 1 or more"),
        ((100, 1, 1, 8), "head_dim must be at least 16"),
    ],
)
def test_sizes_are_checked(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        generate(*arguments)
    with pytest.raises(ValueError, match=r"outliers must be in \[0, 8\]"):
        generate(100, 1, 1, 64, outliers=9)


def test_outliers_cost_four_bits_without_smoothing_the_mass(capsys):
    path = Path(__file__).resolve().parents[2] / "examples" / "outlier_channels.py"
    spec = importlib.util.spec_from_file_location("outlier_channels", path)
    example = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert example.main(["--length", "2048"]) == 0
    exact, *lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert exact[0] == "exact masses"
    mass = {(int(n), int(bits), int(smooth), rotation): float(kept) for n, bits, smooth, rotation, _, kept, *_ in lines}
    assert len(mass) == 14
    assert all(0 < float(figure) <= 1 for line in lines for figure in line[4:])
    plain = mass[0, 4, 1024, "none"]
    assert plain == pytest.approx(float(exact[5]), abs=0.02)
    assert mass[4, 4, 0, "none"] < plain - 0.1
    for rescue in ((8, 0, "none"), (4, 1024, "none"), (4, 0, "Hadamard"), (4, 0, "random")):
        assert mass[4, *rescue] > plain - 0.02
