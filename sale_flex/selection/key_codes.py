# SPDX-License-Identifier: BSD-3-Clause
"""Codes of earlier chunks' keys, kept beside a KV cache: chunked prefill then codes new keys only."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sale_flex.blocks.packing import pack_int4, unpack_int4


class Coded(NamedTuple):
    """Codes with a scale per key block, or per group of as many keys."""

    codes: Tensor
    """int8 ``[B, Hkv, R, D]``, as many rows for every block, and padding."""
    scale: Tensor
    """float32 ``[B, Hkv, G]``; NaN: always hit."""


class Form(NamedTuple):
    """What a rule's codes look like."""

    made_with: dict[str, object]
    """All that codes depend on besides the keys; has ``"block_size"``, ``"bits"`` and ``"smooth_tokens"``."""
    rows: tuple[int, ...]
    """Rows that a key block has in each tensor of codes."""
    signed: tuple[bool, ...]
    """Whether the codes of each have a sign."""
    step: int
    """Rows are padded to a multiple of this."""
    by_group: bool
    """Whether scales belong to groups of keys counted from the first valid one, not to key blocks."""

    @property
    def block_k(self) -> int:
        """Keys a block."""
        return self.made_with["block_size"][1]  # type: ignore[index]

    @property
    def packed(self) -> bool:
        """Whether two codes are stored in a byte."""
        return self.made_with["bits"] == 4

    def final_blocks(self, keys: int, first_valid: int) -> int:
        """Blocks whose codes depend on the first `keys` keys alone; `first_valid` is the most left padding."""
        smooth_tokens = self.made_with["smooth_tokens"]
        assert isinstance(smooth_tokens, int)
        if keys < first_valid + smooth_tokens:
            return 0
        # Of padded rows, the group that overlaps the end of a block may end up to a block later.
        overhang = self.block_k - 1 if self.by_group and first_valid else 0
        return max(keys - overhang, 0) // self.block_k


@dataclass
class _Stored:
    """What is stored of one prompt's keys."""

    form: Form
    of_keys: dict[str, object]
    """What must not change from call to call: the sizes, dtype and device of the keys."""
    mean: Tensor
    """float32 ``[B, Hkv, D]``: the smoothing mean that was subtracted."""
    start: Tensor
    """int32 ``[B]``: first valid keys."""
    blocks: int
    """How many are stored; the tables may have room for more."""
    tables: list[Tensor]
    """``[B, Hkv or 1, blocks * rows, ...]``: codes, as many scales, last valid keys, and `_valid`."""


class KeyCodes:
    """Codes of the keys of earlier chunks, for chunked prefill beside a KV cache.

    Hand the same object to every call of one attention layer on one growing sequence. A call forgets what was stored of
    keys from its first query's key index on, codes the keys that are not stored, and stores whole key blocks that no
    later key changes: from the call on in which all of the smoothing mean's ``smooth_tokens`` keys are there. What is
    chosen is what the call chooses without it. A call that starts at key 0 starts anew.

    Codes of 4 bits are packed two to a byte. With them go scales and the last key of every block: where that key, the
    smoothing mean or the padding is not what it was (batch rows were permuted, keys overwritten), blocks that may be
    wrong are kept: of the relative rule the block, of the mass rule all blocks of that batch row and KV head. (Beyond
    1,024 key blocks, on a GPU and with mods, those that find no room are counted in `SaleStats.dropped_blocks`.)

    A score_mod that changes from key to key takes other codes than one that does not, and so another `KeyCodes`.

    Args:
        first_valid: No batch row's first valid key is after this one: the most left padding, in tokens. Where a row has
            more, its blocks may all be kept.
        renew: Whether a call with keys of another size, dtype or device, or with options that want other codes, starts
            anew. Such calls are refused otherwise.

    Raises:
        TypeError, ValueError: `first_valid` is no int, or negative.
    """

    def __init__(self, first_valid: int = 0, *, renew: bool = False) -> None:
        self._stored: _Stored | None = None
        self._first_valid = _checked_length("first_valid", first_valid)
        self._renew = renew

    @property
    def first_valid(self) -> int:
        """The most left padding, in tokens. Another value clears the store."""
        return self._first_valid

    @first_valid.setter
    def first_valid(self, value: int) -> None:
        if _checked_length("first_valid", value) != self._first_valid:
            self.clear()
        self._first_valid = value

    @property
    def length(self) -> int:
        """Keys from key 0 on whose codes are stored, in tokens: whole key blocks."""
        return 0 if self._stored is None else self._stored.blocks * self._stored.form.block_k

    @property
    def nbytes(self) -> int:
        """Bytes that are held, with room for up to half as many blocks again."""
        if self._stored is None:
            return 0
        return sum(x.nbytes for x in (*self._stored.tables, self._stored.mean, self._stored.start))

    def truncate(self, length: int) -> None:
        """Forget the codes that depend on keys from `length` on: whole blocks, and all if the mean does.

        Raises:
            TypeError, ValueError: `length` is no int, or negative.
        """
        _checked_length("length", length)
        if self._stored is None:
            return
        self._stored.blocks = min(self._stored.blocks, self._stored.form.final_blocks(length, self._first_valid))
        if not self._stored.blocks:
            self.clear()

    def clear(self) -> None:
        """Forget everything, and free its memory."""
        self._stored = None

    def __repr__(self) -> str:
        return f"KeyCodes({self.length} keys, {self.nbytes} bytes)"


class Reuse(NamedTuple):
    """A store, for one call."""

    key_codes: KeyCodes
    stop: int
    """One past the key of the last query: keys from here on may not be written yet."""


Quantize = Callable[[Tensor, Tensor], Sequence[Coded]]
"""``(key, bounds)``: codes of keys ``[B, Hkv, S, D]`` whose bounds are int32 ``[B, 3]``."""


def reuse_of(key_codes: KeyCodes | None, query: Tensor, key: Tensor, q_offset: int | Tensor | None) -> Reuse | None:
    """Forget what a call may have changed, and say what it may store.

    Args:
        key_codes: The store, or None.
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``.
        q_offset: As the user gave it, checked.

    Raises:
        TypeError: `key_codes` is none.
        ValueError: `q_offset` is a tensor, whose value the host does not know.
        NotImplementedError: Under torch.compile.
    """
    if key_codes is None:
        return None
    if not isinstance(key_codes, KeyCodes):
        raise TypeError(f"key_codes must be a sale_flex.KeyCodes or None, got {type(key_codes).__name__}.")
    _refuse_compiling()
    if isinstance(q_offset, Tensor):
        raise ValueError(
            "q_offset must be an int beside key_codes, because it says how many keys are known, got a tensor; pass an "
            "int, or leave key_codes out."
        )
    past = key.shape[2] - query.shape[2] if q_offset is None else int(q_offset)
    key_codes.truncate(past)
    return Reuse(key_codes, past + query.shape[2])


def code_rest(
    reuse: Reuse, key: Tensor, mean: Tensor, bounds: Tensor, form: Form, quantize: Quantize
) -> tuple[list[Coded], Tensor | None]:
    """Codes of all keys, of which those that are not stored are made, and what is final is stored.

    Args:
        reuse: The store, truncated to what the call leaves as it is.
        key: ``[B, Hkv, Skv, D]``.
        mean: float32 ``[B, Hkv, D]``: the smoothing mean.
        bounds: int32 ``[B, 3]``.
        form: Of the codes.
        quantize: Codes keys; a scale per block of the keys it gets, or per group of their valid ones.

    Returns:
        Codes of `form` with their scales, and bool ``[B, Hkv, N]``: which of the first N blocks are stale, their codes
        made from other keys; None if no stored code is among them.

    Raises:
        ValueError: What is stored was made with other options, or from keys of other sizes, and is not to be renewed.
    """
    _refuse_compiling()
    store = reuse.key_codes
    stored, first_valid, size = store._stored, store.first_valid, form.block_k
    of_keys = _of_keys(key)
    if stored is not None:
        before, now = stored.form.made_with | stored.of_keys, form.made_with | of_keys
        if store._renew and before != now:
            store.clear()
            stored = None
        else:
            _check_same(before, now)
    known = 0 if stored is None else stored.blocks
    # The groups of padded rows are up to so many blocks behind those of unpadded ones.
    first = max(known - (-(-first_valid // size) if form.by_group else 0), 0)
    fresh = list(quantize(key[:, :, first * size :], _shifted(bounds, first * size, form.by_group)))
    blocks = -(-key.shape[2] // size)
    if stored is None or not first:
        made, stale, known = fresh, None, 0
        stored = _Stored(form, of_keys, mean, bounds[:, 1].clone(), 0, _empty_tables(key, form))
    else:
        made = [_joined(stored, n, part, first, known, blocks) for n, part in enumerate(fresh)]
        stale = _stale(stored, key, mean, bounds, first_valid)
    final = form.final_blocks(min(reuse.stop, key.shape[2]), first_valid)
    if final > known:
        codes = [x.codes[:, :, (known - first) * n : (final - first) * n] for x, n in zip(fresh, form.rows)]
        rows = [
            *(pack_int4(x) if form.packed else x for x in codes),
            *(x.scale[:, :, first:final] for x in made),
            _last_keys(key, bounds, known, final, size),
            _valid(bounds, known, final, size),
        ]
        starts = [known] * len(codes) + [first] * len(codes) + [known] * 2
        _write(stored, rows, starts, final)
        store._stored = stored
    return made, stale


def _checked_length(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int (a number of tokens), got {value!r}.")
    if value < 0:
        raise ValueError(f"{name} must be at least 0 tokens, got {value}.")
    return value


def _refuse_compiling() -> None:
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "key_codes can not be used under torch.compile, whose programs keep no store; leave it out there: the same "
            "blocks are chosen."
        )


def _of_keys(key: Tensor) -> dict[str, object]:
    batch, heads, _, dim = key.shape
    return {"batch": batch, "key heads": heads, "head_dim": dim, "dtype": key.dtype, "device": key.device}


def _check_same(stored: dict[str, object], called: dict[str, object]) -> None:
    if stored == called:
        return
    names = [x for x in {**stored, **called} if stored.get(x) != called.get(x)]
    theirs, ours = (", ".join(f"{x} {side[x]}" for x in names if x in side) for side in (stored, called))
    raise ValueError(
        f"key_codes must be of the call's keys and options, but holds codes of {theirs} while the call has {ours}; "
        "call its clear(), or take a new KeyCodes for them."
    )


def _shifted(bounds: Tensor, first: int, by_group: bool) -> Tensor:
    """Bounds of the keys from `first` on; of groups, from where a row's group after as many keys begins."""
    offset, start, end = bounds.unbind(1)
    start = start if by_group else (start - first).clamp_min(0)
    return torch.stack([offset - first, start, torch.maximum(end - first, start)], 1)


def _joined(stored: _Stored, n: int, fresh: Coded, first: int, known: int, blocks: int) -> Coded:
    """Stored codes of `known` blocks and scales of `first`, and what follows of those made from block `first` on."""
    form, parts = stored.form, len(stored.form.rows)
    rows, codes = form.rows[n], fresh.codes
    kept = stored.tables[n][:, :, : known * rows]
    total = -(-blocks * rows // form.step) * form.step
    joined = codes.new_empty(*codes.shape[:2], total, codes.shape[3])
    joined[:, :, : known * rows] = unpack_int4(kept, form.signed[n]) if form.packed else kept
    joined[:, :, known * rows : blocks * rows] = codes[:, :, (known - first) * rows : (blocks - first) * rows]
    joined[:, :, blocks * rows :] = 0
    scale = fresh.scale.new_zeros(*codes.shape[:2], total // rows)
    scale[:, :, :first] = stored.tables[parts + n][:, :, :first]
    scale[:, :, first:blocks] = fresh.scale[:, :, : blocks - first]
    return Coded(joined, scale)


def _stale(stored: _Stored, key: Tensor, mean: Tensor, bounds: Tensor, first_valid: int) -> Tensor:
    """Which stored blocks are of other keys, another mean or other padding, bool ``[B, Hkv, blocks]``."""
    size, blocks = stored.form.block_k, stored.blocks
    keys, valid = (x[:, :, :blocks] for x in stored.tables[-2:])
    now_valid = _valid(bounds, 0, blocks, size)
    # Bits, so that a NaN is the NaN that it was.
    bits = torch.int32 if key.element_size() == 4 else torch.int16
    other = (_last_keys(key, bounds, 0, blocks, size).view(bits) != keys.view(bits)).any(-1)
    other = (other & (now_valid[..., 0] < now_valid[..., 1])) | (now_valid != valid).any(-1)
    start = bounds[:, 1]
    moved = start != stored.start
    if stored.form.by_group:
        moved = moved | (start > first_valid)
    return other | (mean != stored.mean).any(-1, keepdim=True) | moved[:, None, None]


def _last_keys(key: Tensor, bounds: Tensor, first: int, stop: int, size: int) -> Tensor:
    """The last valid key of blocks `first` to `stop`, ``[B, Hkv, stop - first, D]``; any key where there is none."""
    ends = torch.arange(first + 1, stop + 1, device=key.device) * size
    at = (torch.minimum(ends, bounds[:, 2, None]) - 1).clamp_min(0)  # [B, blocks]
    return key.gather(2, at[:, None, :, None].expand(*key.shape[:2], -1, key.shape[3]))


def _valid(bounds: Tensor, first: int, stop: int, size: int) -> Tensor:
    """First and one-past-last valid key within each block from `first` to `stop`, uint8 ``[B, 1, stop - first, 2]``."""
    begins = torch.arange(first, stop, device=bounds.device) * size
    return (bounds[:, None, None, 1:] - begins[:, None]).clamp(0, size).to(torch.uint8)


def _empty_tables(key: Tensor, form: Form) -> list[Tensor]:
    batch, heads, _, dim = key.shape
    width, dtype = (dim // 2, torch.uint8) if form.packed else (dim, torch.int8)
    with _writable():
        return [
            *(key.new_empty(batch, heads, 0, width, dtype=dtype) for _ in form.rows),
            *(key.new_empty(batch, heads, 0, dtype=torch.float32) for _ in form.rows),
            key.new_empty(batch, heads, 0, dim),
            key.new_empty(batch, 1, 0, 2, dtype=torch.uint8),
        ]


def _writable() -> AbstractContextManager[None]:
    """For tensors that later calls write to, whether those run under inference_mode or not."""
    return torch.inference_mode(False)


def _write(stored: _Stored, rows: list[Tensor], starts: list[int], blocks: int) -> None:
    """Write each table's rows from its block in `starts` on, up to `blocks`, with room to grow."""
    per_block = [*stored.form.rows, *[1] * (len(rows) - len(stored.form.rows))]
    for n, (table, new, start, each) in enumerate(zip(stored.tables, rows, starts, per_block)):
        if table.shape[2] < blocks * each:
            room = max(blocks, table.shape[2] // each * 3 // 2)
            with _writable():
                old, table = table, table.new_empty(*table.shape[:2], room * each, *table.shape[3:])
            table[:, :, : start * each] = old[:, :, : start * each]
            stored.tables[n] = table
        table[:, :, start * each : blocks * each] = new
    stored.blocks = blocks
