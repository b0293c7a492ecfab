# SPDX-License-Identifier: BSD-3-Clause
"""The ready masks of positions and documents, and their combinations, against sets of keys written out row by row."""

from itertools import groupby

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import create_mask

from sale_flex import mods

Q_LEN, KV_LEN = 13, 17
OFFSETS = [0, 4, -5, 9, torch.tensor(4), torch.tensor(-5, dtype=torch.int32)]
offsets = st.integers(-2 * Q_LEN, 2 * KV_LEN).flatmap(
    lambda offset: st.sampled_from([offset, torch.tensor(offset), torch.tensor(offset, dtype=torch.int32)])
)
windows = st.integers(1, KV_LEN + 3)
documents = st.lists(st.integers(0, 3), min_size=KV_LEN, max_size=KV_LEN)


def shown(mask_mod, batch=1, heads=1):
    """What a mask shows, bool ``[B, H, Q_LEN, KV_LEN]``: under vmap, as torch evaluates it."""
    return create_mask(mask_mod, batch, heads, Q_LEN, KV_LEN, device="cpu")


def assert_shows(mask_mod, keys_of, offset):
    """Row i sees the keys that ``keys_of(position)`` names, as far as there are such keys."""
    for row, seen in enumerate(shown(mask_mod)[0, 0]):
        expected = set(keys_of(row + int(offset))) & set(range(KV_LEN))
        assert set(seen.nonzero().flatten().tolist()) == expected, f"row {row}"


def assert_ranges(mask_mod, *, exact, batch=1):
    """No row sees a key outside its key range, which, if `exact`, begins and ends with a key that some row sees."""
    mask = shown(mask_mod, batch)
    for b in range(batch):
        for first_q in range(Q_LEN):
            for last_q in range(first_q, Q_LEN):
                arguments = [torch.tensor(n, dtype=torch.int32) for n in (b, 0, first_q, last_q)]
                first, last = (int(n) for n in mask_mod.key_range(*arguments))
                seen = mask[b, 0, first_q : last_q + 1].any(0).nonzero().flatten().tolist()
                where = f"batch row {b}, rows {first_q} to {last_q}"
                assert all(first <= key <= last for key in seen), where
                if seen and exact:
                    assert (max(first, 0), min(last, KV_LEN - 1)) == (seen[0], seen[-1]), where


def runs(ids):
    """Positions of each run of equal ids."""
    return [[place for place, _ in run] for _, run in groupby(enumerate(ids), key=lambda pair: pair[1])]


def own_run(ids, position):
    return next((run for run in runs(ids) if position in run), [])


@pytest.mark.parametrize("offset", OFFSETS, ids=str)
def test_causal(offset):
    mask = mods.causal(offset)
    assert_shows(mask, lambda p: range(p + 1), offset)
    assert_ranges(mask, exact=True)


@given(windows, offsets)
def test_sliding_window(window, offset):
    mask = mods.sliding_window(window, offset)
    assert_shows(mask, lambda p: range(p - window + 1, p + 1), offset)
    assert_ranges(mask, exact=True)


@given(windows, offsets)
def test_sliding_window_on_both_sides(window, offset):
    mask = mods.sliding_window(window, offset, causal=False)
    assert_shows(mask, lambda p: [key for key in range(KV_LEN) if abs(key - p) < window], offset)
    assert_ranges(mask, exact=True)


@given(st.integers(0, KV_LEN + 3), offsets, st.booleans())
def test_prefix_lm(prefix, offset, as_tensor):
    mask = mods.prefix_lm(torch.tensor(prefix) if as_tensor else prefix, offset)
    assert_shows(mask, lambda p: {*range(p + 1), *range(prefix)}, offset)
    assert_ranges(mask, exact=True)


def test_prefix_lm_of_batch_rows():
    lengths = [0, 5, 16]
    mask = mods.prefix_lm(torch.tensor(lengths), 2)
    together = shown(mask, batch=3)
    for b, length in enumerate(lengths):
        assert together[b].equal(shown(mods.prefix_lm(length, 2))[0])
    assert_ranges(mask, exact=True, batch=3)


@given(documents, offsets, st.sampled_from([torch.int64, torch.int32, torch.uint8]))
def test_document(ids, offset, dtype):
    mask = mods.document(torch.tensor(ids, dtype=dtype), offset)
    assert_shows(mask, lambda p: own_run(ids, p), offset)
    assert_ranges(mask, exact=True)


@given(st.lists(documents, min_size=1, max_size=3), offsets)
def test_document_of_batch_rows(rows, offset):
    mask = mods.document(torch.tensor(rows), offset)
    together = shown(mask, batch=len(rows))
    for b, ids in enumerate(rows):
        assert together[b].equal(shown(mods.document(torch.tensor(ids), offset))[0])
    assert_ranges(mask, exact=True, batch=len(rows))


def test_one_row_of_documents_serves_a_batch():
    ids = torch.arange(KV_LEN) // 6
    assert shown(mods.document(ids[None]), batch=2).equal(shown(mods.document(ids), batch=2))


def test_documents_longer_than_a_table_on_a_cpu():
    ids = torch.arange(2**20 + 3) // 1000
    mask = mods.document(ids)
    row, key = torch.tensor([5, 1_048_577, 1_048_577]), torch.tensor([999, 1_048_578, 1_047_999])
    assert mask(row * 0, row * 0, row, key).tolist() == [True, True, False]


@given(windows, documents, st.integers(0, 5), offsets)
def test_combinations_are_those_of_torch(window, ids, prefix, offset):
    masks = [
        mods.sliding_window(window, offset),
        mods.document(torch.tensor(ids), offset),
        mods.prefix_lm(prefix, offset),
    ]
    for ours, theirs in ((mods.and_masks, torch_flex.and_masks), (mods.or_masks, torch_flex.or_masks)):
        combined = ours(*masks)
        assert shown(combined).equal(shown(theirs(*masks)))
        assert_ranges(combined, exact=False)
    assert mods.and_masks(masks[0]) is masks[0]


def test_ranges_of_combinations():
    rows = [torch.tensor(n) for n in (0, 0, 8, 11)]
    window, packed = mods.sliding_window(4), mods.document(torch.arange(KV_LEN) // 10)
    unknown = lambda b, h, q, kv: kv >= 0  # noqa: E731
    assert [int(n) for n in mods.and_masks(window, mods.causal()).key_range(*rows)] == [5, 11]
    assert [int(n) for n in mods.and_masks(window, packed).key_range(*rows)] == [5, 11]
    assert [int(n) for n in mods.or_masks(window, packed).key_range(*rows)] == [0, 16]
    assert mods.and_masks(unknown, window, unknown).key_range is window.key_range
    assert not hasattr(mods.and_masks(unknown, unknown), "key_range")
    assert not hasattr(mods.or_masks(window, unknown), "key_range")


@pytest.mark.parametrize("numbers", [True, False], ids=["ints", "tensors"])
def test_a_users_key_range(numbers):
    def even(b, h, q_idx, kv_idx):
        return (kv_idx % 2 == 0) & (kv_idx < 12)

    def key_range(b, h, first_q, last_q):
        return (0, 11) if numbers else (first_q * 0, first_q * 0 + 11)

    mask = mods.with_key_range(even, key_range)
    assert not hasattr(even, "key_range")
    assert shown(mask).equal(shown(even))
    assert mask.key_range is key_range
    rows = [torch.tensor(n) for n in (0, 0, 8, 12)]
    window = mods.sliding_window(5)
    twelve = mods.with_key_range(lambda b, h, q_idx, kv_idx: kv_idx == 12, lambda b, h, first_q, last_q: (12, 12))
    for other, shared, hull in ((window, [4, 11], [0, 12]), (twelve, [12, 11], [0, 12])):
        for pair in ((mask, other), (other, mask)):
            assert [int(n) for n in mods.and_masks(*pair).key_range(*rows)] == shared
            assert [int(n) for n in mods.or_masks(*pair).key_range(*rows)] == hull
            assert_ranges(mods.and_masks(*pair), exact=False)
            assert_ranges(mods.or_masks(*pair), exact=False)


def test_tensors_are_captured_as_int32_and_read_when_used():
    offset = torch.tensor(0, dtype=torch.int32)
    mask = mods.causal(offset)
    offset += 3
    assert shown(mask).equal(shown(mods.causal(3)))
    wide = mods.causal(torch.tensor(3))
    captured = [cell.cell_contents for cell in wide.__closure__ if isinstance(cell.cell_contents, torch.Tensor)]
    assert [tensor.dtype for tensor in captured] == [torch.int32]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: mods.causal(0.0), TypeError, "q_offset must be an int, or .* got float"),
        (lambda: mods.causal(True), TypeError, "q_offset must be .* got bool"),
        (
            lambda: mods.causal(torch.zeros(2, 1, dtype=torch.int32)),
            ValueError,
            r"q_offset .* got shape \[2, 1\]; .* squeeze\(\)",
        ),
        (lambda: mods.causal(torch.tensor(0.0)), TypeError, r"q_offset .* dtype torch.float32; .* q_offset.int\(\)"),
        (lambda: mods.sliding_window(0), ValueError, "window must be an int of at least 1, got 0"),
        (lambda: mods.sliding_window(8.0), TypeError, "window must be an int of at least 1, got float"),
        (lambda: mods.prefix_lm(-1), ValueError, "prefix_length must be at least 0, got -1"),
        (lambda: mods.prefix_lm(1.5), TypeError, "prefix_length must be .* got float"),
        (
            lambda: mods.prefix_lm(torch.zeros(2, 1, dtype=torch.int32)),
            ValueError,
            r"prefix_length .* got shape \[2, 1\]",
        ),
        (lambda: mods.prefix_lm(torch.zeros(2)), TypeError, "prefix_length must be an integer tensor, got dtype"),
        (lambda: mods.document([0, 0, 1]), TypeError, "ids must be an integer tensor, got list"),
        (
            lambda: mods.document(torch.zeros(4, dtype=torch.bool)),
            TypeError,
            "ids must be an integer tensor, got dtype torch.bool",
        ),
        (lambda: mods.document(torch.zeros(1, 1, 4, dtype=torch.int32)), ValueError, r"ids .* got \[1, 1, 4\]"),
        (lambda: mods.document(torch.zeros(0, dtype=torch.int32)), ValueError, r"ids .* not be empty, got \[0\]"),
        (lambda: mods.and_masks(), ValueError, "and_masks needs at least one"),
        (lambda: mods.or_masks(mods.causal(), None), TypeError, "or_masks takes mask_mods, got NoneType at place 1"),
        (lambda: mods.with_key_range(None, mods.causal()), TypeError, "mask_mod must be a function, got NoneType"),
        (lambda: mods.with_key_range(mods.causal(), (0, 4)), TypeError, "key_range must be a function, got tuple"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
