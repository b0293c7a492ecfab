# SPDX-License-Identifier: BSD-3-Clause
"""The torch path of programmed calls against the reference, stage by stage."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from sale_flex import Mass, Relative, SaleConfig, reference
from sale_flex.blocks.bits import pack_bits, unpack_bits
from sale_flex.kernels.arguments import Grid, MaskSpec, MassOptions, Near, Structure
from sale_flex.ops.fallback import tiles
from sale_flex.ops.fallback.key_mean import key_mean
from sale_flex.ops.fallback.mass import mass_hits
from sale_flex.ops.fallback.mass_scored import STEP
from sale_flex.ops.fallback.moments import quantize_moments
from sale_flex.ops.fallback.quantize import quantize_groups, quantize_rows
from sale_flex.ops.fallback.row_limits import row_limits
from sale_flex.ops.fallback.rows import attend_rows
from sale_flex.ops.fallback.scan import scan_max
from sale_flex.ops.fallback.structure import block_structure, candidate_blocks
from sale_flex.testing import Shape, random_inputs, structured_inputs
from sale_flex.testing.block_maps import decode_list
from sale_flex.testing.strategies import configs, seeds, shapes
from sale_flex.testing.tolerances import gamma, unit_roundoff

MOD_CONSTANTS = 50.0
"""No mod below adds more than this to a logit, or multiplies it by more than 1."""


FAST = {"pool_mode": "mean", "sub_block": 8, "bits": 4}
NARROW = {"block_size": (64, 32), "sink_tokens": 8, "local_tokens": 8, "min_length": 0}
BUSY = Shape(440, 440, batch=2, heads=4, kv_heads=2, head_dim=32, kv_range=((0, 440), (37, 430)))
RULES = {
    "moments": {"sub_block": 16, "threshold": 0.05},
    "moments, 8 bits": {"threshold": 0.05, "pool": 8, "sub_block": 4, "bits": 8},
    "scan": {"threshold": 0.05, "pool": 4, "pool_mode": "last", "sub_block": 1},
    "default": {"threshold": 0.05, "pool": 4, "pool_mode": "last", "sub_block": 1, "bits": 8},
    "scan, 8 bits": {"threshold": 0.03, "pool": 1, "sub_block": 1, "bits": 8},
    "relative": {"rule": "relative", "bits": 8, "threshold": 0.2},
    "relative, own key": {"rule": "relative", "threshold": 2.0, "bits": 8, "local_tokens": 1, "sink_tokens": 0},
}


@dataclass(frozen=True)
class Named:
    """A mod that prints as what it is."""

    name: str
    call: Callable[..., Tensor]
    by_head: bool = False

    def __call__(self, *arguments: Any) -> Tensor:
        return self.call(*arguments)

    def __repr__(self) -> str:
        return self.name


@st.composite
def masks(draw: st.DrawFn, shape: Shape) -> Named | None:
    """Masks of every kind: of positions, of tables, by head and by batch row, and such as hide all from some rows."""
    generator = torch.Generator().manual_seed(draw(seeds()))
    longest = max(shape.q_len, shape.kv_len)
    n = draw(st.integers(1, longest) | st.just(longest))
    ids = torch.randint(0, 3, (shape.batch, longest), generator=generator).sort(-1).values
    table = torch.rand(shape.heads, longest // 16 + 1, longest // 16 + 1, generator=generator) < 0.5
    dense = torch.rand(shape.q_len, shape.kv_len, generator=generator) < draw(st.sampled_from([0.02, 0.5, 0.99]))
    kinds = {
        "window": lambda b, h, q, kv: (q + shape.offset - kv).abs() < n,
        "prefix by head": lambda b, h, q, kv: (kv < n * (h + 1)) | (q == kv),
        "documents": lambda b, h, q, kv: ids[b, q] == ids[b, kv],
        "blocks by head": lambda b, h, q, kv: table[h, q // 16, kv // 16],
        "elements": lambda b, h, q, kv: dense[q, kv],
        "rows, not each fifth": lambda b, h, q, kv: (q >= n) & (q % 5 != 0),
        "keys": lambda b, h, q, kv: kv >= n,
        "nothing": lambda b, h, q, kv: kv < 0,
    }
    kind = draw(st.sampled_from(["none", *kinds]))
    return None if kind == "none" else Named(f"{kind} ({n})", kinds[kind], kind.endswith("head"))


@st.composite
def scores(draw: st.DrawFn, shape: Shape, special: bool = True) -> Named | None:
    """Changes of logits; `special` ones return -inf or NaN here and there. None stretches differences of logits."""
    generator = torch.Generator().manual_seed(draw(seeds()))
    table = torch.randn(shape.batch, shape.heads, shape.kv_len, generator=generator)
    rows = torch.randn(shape.q_len, generator=generator)
    kinds = {
        "cap": lambda s, b, h, q, kv: 5 * torch.tanh(s / 5),
        "slope": lambda s, b, h, q, kv: s - (q - kv).abs() * 0.1 * 2.0 ** -(h + 1.0),
        "bias": lambda s, b, h, q, kv: s + table[b, h, kv] * rows[q],
        "-inf": lambda s, b, h, q, kv: torch.where((q + kv + h) % 5 == 0, -torch.inf, s),
        "nan": lambda s, b, h, q, kv: torch.where((q + kv) % 67 == 3, torch.nan, s),
    }
    kind = draw(st.sampled_from(["none", *list(kinds)[: 5 if special else 3]]))
    return None if kind == "none" else Named(kind, kinds[kind])


@st.composite
def listed_masks(draw: st.DrawFn, shape: Shape, block_size: tuple[int, int]) -> BlockMask | None:
    """Block masks with any lists, partial and full, in blocks as large as `block_size`, smaller, and larger."""
    if draw(st.booleans()):
        return None
    quarters = draw(st.tuples(*[st.sampled_from([1, 2, 4, 8])] * 2))
    sizes = [size * n // 4 for size, n in zip(block_size, quarters)]
    blocks = [-(-length // size) for length, size in zip((shape.q_len, shape.kv_len), sizes)]
    batch, heads = draw(st.sampled_from([1, shape.batch])), draw(st.sampled_from([1, shape.heads]))
    kinds = torch.rand(batch, heads, *blocks, generator=torch.Generator().manual_seed(draw(seeds())))
    lists = []
    for flags in (kinds < 0.4, (kinds >= 0.4) & (kinds < 0.85)):
        order = flags.byte().argsort(dim=-1, descending=True, stable=True).int()
        lists += [flags.sum(-1, dtype=torch.int32), order]
    mask = draw(st.none() | masks(shape))
    return BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=tuple(sizes), mask_mod=mask, seq_lengths=(shape.q_len, shape.kv_len), compute_q_blocks=False
    )


@dataclass(frozen=True)
class Case:
    """A call, as the reference takes it, and how its fallback is run."""

    shape: Shape
    config: SaleConfig
    seed: int
    mask: Named | None = None
    score: Named | None = None
    block_mask: BlockMask | None = None
    is_causal: bool = True
    by_head: bool = True  # whether the structure has all heads even if all see the same
    tile: int = 2**22  # elements of the attention map
    scale: float = 0.2
    gain: float = 1.0  # of the queries

    @property
    def inputs(self) -> Any:
        x = structured_inputs(self.shape, self.seed)
        return x._replace(query=x.query * self.gain)

    @property
    def bounds(self) -> Tensor:
        s = self.shape
        return reference.make_bounds(s.batch, s.q_len, s.kv_len, **s.positions())

    @property
    def mods(self) -> dict[str, Any]:
        """As the reference takes them."""
        masks = {"mask_mod": self.mask, "block_mask": self.block_mask}
        return {"score_mod": self.score, **masks, "is_causal": self.is_causal}

    @property
    def masks(self) -> list[Named]:
        """The masks there are. What torch puts where a block mask has none hides nothing, and takes tensors alone."""
        own = None if self.block_mask is None else self.block_mask.mask_mod
        return [mask for mask in (self.mask, own) if isinstance(mask, Named)]

    @property
    def spec(self) -> MaskSpec:
        """As the fallback takes it."""
        given, m = self.masks, self.block_mask
        mask = (lambda *at: given[0](*at) & given[-1](*at)) if given else None
        if m is None:
            return MaskSpec(self.bounds, self.is_causal, mask, None, 1, 1)
        blocks = -(-self.shape.kv_len // m.BLOCK_SIZE[1])
        flags = decode_list(m.kv_num_blocks, m.kv_indices, blocks)
        flags |= decode_list(m.full_kv_num_blocks, m.full_kv_indices, blocks)
        return MaskSpec(self.bounds, self.is_causal, mask, pack_bits(flags), *m.BLOCK_SIZE)

    @property
    def structure_heads(self) -> int:
        listed = self.block_mask is not None and self.block_mask.kv_num_blocks.shape[1] > 1
        return self.shape.heads if self.by_head or listed or any(mask.by_head for mask in self.masks) else 1

    @property
    def lengths(self) -> tuple[int, int]:
        return self.shape.q_len, self.shape.kv_len

    @property
    def grid(self) -> Grid:
        return Grid(*self.lengths, *self.config.block_size)

    @property
    def key_blocks(self) -> int:
        return self.grid.key_blocks

    @property
    def min_length(self) -> int:
        """A call with less than half a block of queries is a decoding step, and keeps all."""
        decoding = 2 * self.shape.q_len < self.config.block_size[0]
        return self.shape.kv_len if decoding else self.config.min_length

    @property
    def near(self) -> Near:
        return Near(self.config.sink_tokens, self.config.local_tokens, self.min_length)

    def expected(self, **options: Any) -> SimpleNamespace:
        """What the reference decides in float64, and on which blocks."""
        x, call = self.inputs, {**self.mods, **self.shape.positions(), "scale": self.scale, "dtype": torch.float64}
        made = reference.keep_map(x.query, x.key, self.config, **call, **options)
        return SimpleNamespace(**made._asdict(), candidate=made.visible & ~made.always)


@st.composite
def cases(
    draw: st.DrawFn, *, kinds: Any = (Mass, Relative), least: int = 1, most: int = 300, special: bool = True
) -> Case:
    """Calls of every form, of so many tokens."""
    dtypes = torch.float32, torch.bfloat16
    shape = draw(shapes(max_tokens=most, min_tokens=least, groups=(1, 3), head_dims=(32,), dtypes=dtypes))
    windows = {"max_min_length": draw(st.sampled_from([0, 0, 100])), "max_window": draw(st.sampled_from([4, 12, 100]))}
    config = draw(configs(heads=shape.heads, kinds=kinds, block_sizes=((64, 64), (64, 32)), **windows))
    mods = masks(shape), scores(shape, special), listed_masks(shape, config.block_size)
    rest = st.booleans(), st.booleans(), st.sampled_from([2**22, 64 * 320 * 2, 1])
    return Case(shape, config, *(draw(of) for of in (seeds(), *mods, *rest)))


def run(case: Case, budget: int | None = None) -> SimpleNamespace:
    """All stages up to the hits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE_ELEMENTS", case.tile)
        return _run(case, case.key_blocks if budget is None else budget)


def lay_out(case: Case) -> Structure:
    visibility = block_structure(case.spec, None, case.structure_heads, case.grid)
    return Structure(visibility, candidate_blocks(visibility, case.bounds, case.is_causal, case.grid, case.near))


def _run(case: Case, budget: int) -> SimpleNamespace:
    c, x = case.config, case.inputs
    visibility, candidates = lay_out(case)
    # What lies behind the last entry means nothing: here it is the last entry again, or no index at all.
    length, lists = candidates.counts.sum(-1, keepdim=True), candidates.blocks
    again = lists.gather(-1, (length.long() - 1).clamp_min(0)).expand_as(lists)
    at = torch.arange(case.key_blocks)
    lists = torch.where(at < length, lists, torch.where(at % 2 == case.seed % 2, again, -(2**31)))
    of_call = case.spec, Structure(visibility, candidates._replace(blocks=lists)), case.score
    mean = key_mean(x.key, case.bounds, c.smooth_tokens)
    block_k = c.block_size[1]
    threshold = torch.as_tensor(c.rule.threshold, dtype=torch.float32).expand(case.shape.heads).contiguous()
    dropped = torch.zeros(case.shape.batch, case.shape.heads, case.grid.query_blocks, dtype=torch.int32)
    if c.rule.name == "relative":
        query_codes = quantize_rows(x.query, c.rule.bits, False)
        key_codes = quantize_groups(x.key, mean, case.bounds, block_k, c.rule.bits, False)
        limits = row_limits(x.query, query_codes[1], x.key, mean, *of_call, threshold, case.scale, case.grid, case.near)
        hits = scan_max(*query_codes, *key_codes, *limits, *of_call, case.scale, case.grid, c.local_tokens, False)
    else:
        options = MassOptions(c.rule.sub_block, c.rule.pool, c.rule.pool_mode == "last", c.rule.bits)
        coded = quantize_moments(x.key, mean, case.bounds, block_k, options.sub_block, options.bits)
        hits, dropped = mass_hits(
            x.query, x.key, mean, coded, *of_call, threshold, case.scale, case.grid, options, case.near, budget
        )
    return SimpleNamespace(hits=hits, dropped=dropped)


def decision_error_bound(case: Case) -> float:
    """How far float32 may move a block from its cut, in nats, either way: `margin` of the reference is in float64.

    With L the largest ``scale * sum |q| |k|`` (pooled rows and mean keys are averages, so theirs are no larger) and M
    that of a product of codes, ``scale * D * max |q| * 2 max |k|`` (a code times its scale is at most the largest
    number it is made from, of a key minus the mean):

    * an exact logit, and the mean's, are off by ``gamma(D + 2) L`` each; a product of codes is exact, its factor and
      the product with it are 5 roundings of M, the sum one more; a mod here rounds 8 times at most, and stretches no
      difference; a spread, at most 2 (g - 1) <= 126, is rounded 8 times: with T = M + 2 L + 50 + 128 all these are
      ``e = 2 gamma(D + 2) L + gamma(24) T``;
    * a log-sum-exp of n numbers off by e is off by e, and ``gamma(n + 32) + gamma(4) T`` for exponentials, their sum,
      and the maximum that is subtracted and added; a total is one over blocks of such;
    * two of them and ln threshold (at most 100 octaves: 70 nats) meet in two roundings;
    * without a score_mod, the logarithm of a row's unit is rounded to 2 ** -16 octaves, which may fall apart.
    """
    x, shape = case.inputs, case.shape
    query, key = x.query.double().abs(), x.key.double().abs()
    group = shape.heads // shape.kv_heads
    largest = case.scale * float((query @ key.repeat_interleave(group, 1).transpose(-1, -2)).max())
    coded = case.scale * shape.head_dim * float(query.max()) * 2 * float(key.max())
    numbers = coded + 2 * largest + MOD_CONSTANTS + 128
    error = 2 * gamma(shape.head_dim + 2) * largest + gamma(24) * numbers
    of_sum = gamma(shape.kv_len + 32) + gamma(4) * numbers
    return 2 * (error + 2 * of_sum) + gamma(4) * (2 * numbers + 70) + 2**-16


def check_structure(case: Case) -> None:
    """Assert that visible, full and always-kept blocks, lists, and what rows see, are exactly the reference's."""
    expected = case.expected()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE_ELEMENTS", case.tile)
        (visible, full, rows), (always, counts, lists) = lay_out(case)
    assert {x.dtype for x in (visible, full, rows, always, counts, lists)} == {torch.int32}
    for bits, wanted in ((visible, expected.visible), (full, expected.full), (always, expected.always)):
        assert torch.equal(*torch.broadcast_tensors(unpack_bits(bits, case.key_blocks), wanted))
    at, block_k = torch.arange(case.key_blocks) * case.config.block_size[1], case.config.block_size[1]
    whole = (at >= case.bounds[:, 1:2]) & (at + block_k <= case.bounds[:, 2:])  # [B, nk]
    of_codes = expected.candidate & expected.full & whole[:, None, None]
    kinds = expected.always, expected.candidate & ~of_codes, of_codes
    stops = counts.cumsum(-1)
    for n, flags in enumerate(kinds):
        assert torch.equal(counts[..., n].expand(flags.shape[:3]), flags.sum(-1).int())
        first = stops[..., n, None] - counts[..., n, None]
        entries = lists.gather(-1, (first + torch.arange(case.key_blocks)).clamp_max(case.key_blocks - 1).long())
        assert torch.equal(decode_list(counts[..., n], entries, case.key_blocks).expand_as(flags), flags)
    sees = reference.visible_elements(
        case.bounds, case.shape.heads, *case.lengths, case.mask, case.block_mask, case.is_causal
    )
    sees = torch.nn.functional.pad(sees, (0, 0, 0, rows.shape[3] - case.shape.q_len))
    key = torch.arange(case.shape.kv_len)
    for n, ends in enumerate((torch.where(sees, key, 2**30).amin(-1), torch.where(sees, key, -1).amax(-1))):
        assert torch.equal(*torch.broadcast_tensors(rows[:, :, n], ends.int()))


@given(cases(special=False))
def test_structure_and_lists_are_those_of_the_reference(case):
    check_structure(case)


@pytest.mark.parametrize("min_length", [64, 65, 192, 193])
@pytest.mark.parametrize("sink_tokens", [0, 1])
def test_where_early_rows_end(min_length, sink_tokens):
    # The first row of a query block sees 64 or 192 keys before its own: it is early one token later.
    config = SaleConfig(Mass.fast(), min_length=min_length, sink_tokens=sink_tokens, local_tokens=1)
    for causal in (True, False):
        check_structure(Case(BUSY, config, 0, is_causal=causal))


def check_hits(case: Case, made: SimpleNamespace, expected: SimpleNamespace) -> None:
    """Assert that candidates are hit as the reference has it, but for those that rounding can move across the cut."""
    doubtful = expected.margin.abs() <= decision_error_bound(case)  # not NaN, which is a hit
    found = unpack_bits(made.hits, case.key_blocks)
    wrong = (found != expected.hit) & expected.candidate & ~doubtful
    assert not wrong.any(), f"at {wrong.nonzero()[0].tolist()}: margin {expected.margin[wrong][0]}"


@given(cases(kinds=(Mass,), least=150))
def test_mass_hits_are_those_of_the_reference(case):
    made = run(case)
    check_hits(case, made, case.expected())
    assert not made.dropped.any()


@given(cases(kinds=(Relative,), least=150))
def test_relative_hits_are_those_of_the_reference(case):
    check_hits(case, run(case), case.expected())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("gain", [1.0, 4.0])
def test_calls_with_much_to_decide(rule, causal, gain):
    # Ragged lengths, hits and misses in both kinds of candidates, and a head for each of what mods may do.
    options = NARROW | RULES[rule]
    config = SaleConfig.from_options(**({} if "rule" in options else FAST) | options)
    table = torch.rand(4, 28, 28, generator=torch.Generator().manual_seed(0)) < 0.9
    absent = torch.nan if config.rule.name == "mass" else -torch.inf

    def mask(b: Any, h: Any, q: Any, kv: Any) -> Tensor:
        return table[h, q // 16, kv // 16] & ((q % 4 != 3) | (h != 3))

    def score(s: Any, b: Any, h: Any, q: Any, kv: Any) -> Tensor:
        capped = 20 * torch.tanh(s / 20) - 0.05 * (q - kv).abs() * (h == 1)
        return torch.where((h == 2) & ((q + kv) % 67 == 3), absent, capped)

    mods = Named("table", mask, True), Named("score", score)
    case = Case(BUSY, config, 3, *mods, is_causal=causal, gain=gain, tile=64 * 448)
    made, expected = run(case), case.expected()
    check_hits(case, made, expected)
    for kind in (expected.candidate & expected.full, expected.candidate & ~expected.full):
        assert 0.02 < float((expected.hit & kind).sum() / kind.sum()) < 0.98


def clear_of_a_budget(case: Case, budget: int, expected: SimpleNamespace) -> Tensor:
    """Query blocks in which rounding can move no cut that a budget raises, bool ``[B, Hq, nq]``."""
    within = decision_error_bound(case)
    if case.score is not None:
        # Cuts rise in steps: rounding may decide where a margin is near any multiple of a step. Infinite ones are NaN.
        steps = expected.margin / STEP
        return ~((steps - steps.round()).abs() * STEP <= within).any(-1)
    x, c = case.inputs, case.config
    call = reference.make_call(
        x.query, x.key, c, **case.mods, **case.shape.positions(), scale=case.scale, dtype=torch.float64
    )._replace(always=expected.always)
    options = reference.mass_options(c)
    sizes = c.block_size[1], options.sub_block, options.bits
    moments = reference.quantize_moments(x.key, call.mean, call.bounds, *sizes)
    masses = reference.row_masses(call, options)
    flagged = moments.nonfinite.repeat_interleave(case.shape.heads // case.shape.kv_heads, 1)[:, :, None]
    threshold = torch.as_tensor(c.rule.threshold, dtype=torch.float32).expand(case.shape.heads)[:, None]
    least, most = (
        reference.decide(
            masses._replace(sums=masses.sums * of_sums, total=masses.total / of_sums),
            threshold,
            flagged & expected.candidate,
            c.block_size[0] // options.pool,
            budget,
        )
        for of_sums in (math.exp(-within), math.exp(within))
    )
    return (least.hit == most.hit).all(-1) & (least.raised == most.raised)


@given(cases(kinds=(Mass,), special=False, least=150), st.integers(0, 2))
def test_a_budget_is_kept_as_in_the_reference(case, budget):
    made, expected = run(case, budget), case.expected(budget=budget)
    found = unpack_bits(made.hits, case.key_blocks) & expected.candidate
    unasked = expected.margin == torch.inf
    assert ((found & ~unasked).sum(-1) <= budget).all()
    clear = clear_of_a_budget(case, budget, expected)
    assert torch.equal(found[clear], (expected.hit & expected.candidate)[clear])
    assert torch.equal(made.dropped[clear], expected.dropped.sum(-1).int()[clear])


@pytest.mark.parametrize(("threshold", "score"), [(0.0, None), (0.02, None), (0.0, "same"), (0.02, "same")])
def test_a_budget_gives_up_the_smallest_masses(threshold, score):
    score = None if score is None else Named(score, lambda s, b, h, q, kv: s)
    config = SaleConfig(Mass.fast(threshold), **NARROW)
    case = Case(BUSY, config, 1, score=score, is_causal=False)
    free = run(case)
    for budget in (0, 1, 3):
        made, expected = run(case, budget), case.expected(budget=budget)
        found, before = (unpack_bits(x.hits, case.key_blocks) & expected.candidate for x in (made, free))
        assert torch.equal(found, expected.hit & expected.candidate)  # no margin here is within rounding of a step
        assert torch.equal(made.dropped, (before & ~found).sum(-1).int())
        assert made.dropped.any()
        # As in plain calls, levels above threshold 0 are all one: with no room for all there is room for none.
        assert bool(found.any()) == (budget > 0 and (threshold > 0 or score is not None))


class Broken(Case):
    """A call with a query and a key that are not finite."""

    @property
    def inputs(self) -> Any:
        x = super().inputs
        query, key = x.query.clone(), x.key.clone()
        query[0, 1, 200, 3] = torch.inf  # which the cap makes finite again, and a favourite of the keys of block 5
        key[..., 3] = torch.where(torch.arange(440) // 64 == 5, key[..., 3].abs(), -key[..., 3].abs())
        key[:, 0, 100, 5] = torch.nan
        return x._replace(query=query, key=key)


@pytest.mark.parametrize("rule", [Mass.fast, Relative], ids=["mass", "relative"])
@pytest.mark.parametrize("threshold", [0.02, 0.9, 1.5])
def test_rows_and_keys_that_are_not_finite(rule, threshold):
    config = SaleConfig(rule(threshold=threshold, bits=4), smooth_tokens=0, **NARROW | {"block_size": (64, 64)})
    mask = Named("holes", lambda b, h, q, kv: (q + kv) % 50 > 0)  # no block is full: all are weighed exactly
    cap = Named("cap", lambda s, b, h, q, kv: 5 * torch.tanh(s / 5))
    case = Broken(BUSY, config, 1, mask, cap, is_causal=False)
    for budget in (None, 0, 1, 2) if rule is Mass.fast else (None,):
        made, expected = run(case, budget), case.expected(budget=budget)
        found = unpack_bits(made.hits, case.key_blocks) & expected.candidate
        assert torch.equal(found, expected.hit & expected.candidate)
        assert torch.equal(found[:, :2, :, 1], expected.candidate[:, :2, :, 1])  # of the key, whatever the budget
        found[:, :2, :, 1] = False
        asked = expected.candidate[0, 1, 3] & (torch.arange(case.key_blocks) != 1)  # of the row
        assert torch.equal(found[0, 1, 3], asked) if budget is None else found.sum(-1).max() <= budget


@given(cases(most=200), st.floats(0.1, 1.0))
def test_rows_attend_to_what_is_kept(case, density):
    if case.score is not None and case.score.name == "nan":
        case = replace(case, score=None)
    x, c = case.inputs, case.config
    nq = -(-case.shape.q_len // c.block_size[0])
    generator = torch.Generator().manual_seed(case.seed)
    kept = torch.rand(case.shape.batch, case.shape.heads, nq, case.key_blocks, generator=generator) < density
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE_ELEMENTS", case.tile)
        output, lse = attend_rows(*x, pack_bits(kept), case.spec, case.score, case.scale, case.grid)
    call = {"bounds": case.bounds, "block_size": c.block_size, "scale": case.scale, **case.mods}
    exact, exact_lse = reference.masked_attention(*x, kept, **call)
    mass, _ = reference.masked_attention(x.query, x.key, x.value.abs(), kept, **call)
    assert output.dtype == x.query.dtype
    assert lse.dtype == torch.float32
    # Of the derivation in `decision_error_bound`: a logit's error, and those of exponentials and their sums.
    error = decision_error_bound(case)
    relative = math.expm1(2 * error) + gamma(3 * case.shape.kv_len + 32) + 2 * unit_roundoff(x.query.dtype)
    assert ((output.double() - exact).abs() <= relative * mass + 1e-30).all()
    nothing = exact_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, nothing)
    assert (output[nothing] == 0).all()
    difference = (lse.double() - exact_lse).masked_fill(nothing, 0.0)
    assert (difference.abs() <= error + gamma(4) * exact_lse.masked_fill(nothing, 0.0).abs()).all()


def test_a_row_takes_no_value_that_it_does_not_see():
    x = random_inputs(Shape(128, 128, head_dim=32))
    value = x.value.clone()
    value[0, 0, 100, 3] = torch.nan
    spec = MaskSpec(reference.make_bounds(1, 128, 128), True, None, None, 1, 1)
    kept = pack_bits(torch.ones(1, 1, 2, 2, dtype=torch.bool))
    output, _ = attend_rows(x.query, x.key, value, kept, spec, None, 0.2, Grid(128, 128, 64, 64))
    assert output[0, 0, 100:, 3].isnan().all()
    assert output[0, 0, :100].isfinite().all()
    assert output[..., :3].isfinite().all()
