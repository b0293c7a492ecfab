# SPDX-License-Identifier: BSD-3-Clause
"""Whatever happens to a KV cache between turns, a turn chooses the blocks that a cache without stored codes makes it
choose, bit for bit."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from config_harness import as_rule
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from models_harness import BY_NAME, CACHE, LAYERS, build, tokens
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

import sale_flex.integrations.transformers as sale_hf
from sale_flex import Mass, SaleConfig
from sale_flex.integrations.transformers.caches import stores_of

pytestmark = pytest.mark.usefixtures("uncompiled_attention")

LLAMA = BY_NAME["Llama"]
ROOM = 2000
CONFIG = SaleConfig(Mass(0.3), min_length=0, sink_tokens=16, local_tokens=32, smooth_tokens=100)
CONFIGS = (
    CONFIG,
    CONFIG.with_options(sub_block=16),
    CONFIG.with_options(sub_block=8, bits=4),
    replace(CONFIG, smooth_tokens=160),
    as_rule(CONFIG, "relative"),
    replace(CONFIG, block_size=(64, 32)),
)


@pytest.fixture(scope="module")
def llama():
    return build(LLAMA, sale_hf.NAME, CONFIG, max_position_embeddings=2048)


@pytest.fixture(autouse=True)
def configured(request):
    if "llama" in request.fixturenames:
        sale_hf.configure(request.getfixturevalue("llama"), CONFIG)


class RoundingLayer(DynamicLayer):
    """Stands for a quantised cache: keys that it has change when others come, by the scale that they share."""

    def update(self, key_states, value_states, *args, **kwargs):
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        step = keys.abs().amax() / 20
        self.keys = (keys / step).round() * step
        return self.keys, values


class EvictingCache(DynamicCache):
    """A user's: its keys are moved within the layer."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        layer.keys, layer.values = (x.roll(1, dims=2) for x in (layer.keys, layer.values))
        return layer.keys, layer.values


class NamedCache(DynamicCache):
    """A user's, that leaves keys alone."""


def cache_of(kind, model):
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=ROOM)
    if kind == "rounding":
        return Cache(layer_class_to_replicate=RoundingLayer)
    return {"dynamic": DynamicCache, "evicting": EvictingCache, "user": NamedCache}[kind]()


def lengths(cache):
    """Keys whose codes are stored, of every layer that has a store."""
    return [codes.length for codes in stores_of(cache).values()]


def without_codes(cache):
    """The same keys in a cache that was never seen; codes are not pickled."""
    same = pickle.loads(pickle.dumps(cache))
    assert not any(lengths(same))
    return same


def turn(model, cache, ids, mask=None, inference=False):
    """Logits, and density of every layer and head (NaN of decoding steps)."""
    sale_hf.reset_stats(model)
    options = {CACHE: cache, "use_cache": True} | ({} if mask is None else {"attention_mask": mask})
    with torch.inference_mode() if inference else torch.no_grad():
        logits = model(ids, **options).logits
    return logits.clone(), torch.tensor([layer.density for layer in sale_hf.stats(model).layers])


def check_turn(model, cache, ids, mask=None, inference=False):
    """A turn is what it is for the same keys without codes. Its density."""
    fresh = without_codes(cache)
    expected, wanted = turn(model, fresh, ids, mask, inference)
    logits, density = turn(model, cache, ids, mask, inference)
    assert torch.equal(density.nan_to_num(2.0), wanted.nan_to_num(2.0))  # NaN of a decoding step, and of padding alone
    assert torch.equal(logits, expected)
    return density


def filled(model, kind="dynamic", batch=1, inference=False, chunks=(192, 192)):
    cache = cache_of(kind, model)
    for n, length in enumerate(chunks):
        turn(model, cache, tokens(batch, length, seed=n), inference=inference)
    return cache


def roll_rows(cache):
    cache.reorder_cache(torch.tensor([1, 0]))


def more_rows(cache):
    cache.reorder_cache(torch.tensor([1, 0, 1]))


def repeat(cache):
    cache.batch_repeat_interleave(3)


def select(cache):
    cache.batch_select_indices(torch.tensor([1]))


def crop(cache):
    cache.crop(-100)


def crop_twice(cache):
    cache.crop(-100)
    cache.crop(-64)


def overwrite(cache):
    for layer in cache.layers:
        layer.keys[:, :, 65:126] *= 3.0


def away_and_back(cache):
    for layer in cache.layers:
        layer.keys = layer.keys.double().float() * 1.5


def swap_layers(cache):
    cache.layers.reverse()


CHANGES = (roll_rows, more_rows, repeat, select, crop, crop_twice, overwrite, away_and_back, swap_layers, Cache.reset)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        pytest.param(kind, change, id=f"{kind}-{change.__name__}")
        for kind in ("dynamic", "static", "user", "rounding")
        for change in CHANGES
        # Static caches have no such method, or only in new releases.
        if kind != "static" or change not in (repeat, select, crop, crop_twice)
    ],
)
def test_a_turn_after_a_change_chooses_what_it_chooses_without_codes(llama, kind, change):
    cache = filled(llama, kind, batch=2)
    change(cache)
    batch = cache.layers[0].keys.shape[0] if cache.layers[0].is_initialized else 2
    for n in range(3):
        density = check_turn(llama, cache, tokens(batch, 192, seed=9 + n))
    assert density.max() < 0.9
    if kind != "rounding":
        assert lengths(cache) == [int(cache.get_seq_length()) // 64 * 64] * LAYERS


def test_other_tokens_decoded_behind_a_crop(llama):
    fresh, cache = filled(llama), filled(llama, chunks=(192, 192, 192))
    cache.crop(-192)
    assert lengths(cache) == [576] * LAYERS  # nobody has looked yet
    for token in tokens(1, 128, seed=5).unbind(1):
        for each in (fresh, cache):
            turn(llama, each, token[:, None])
    assert lengths(cache) == [384] * LAYERS
    for n in range(3):
        (expected, wanted), (logits, density) = (turn(llama, each, tokens(1, 128, seed=n)) for each in (fresh, cache))
        assert density.max() < 0.9
        assert torch.equal(density, wanted)
        assert torch.equal(logits, expected)
    assert lengths(cache) == [896] * LAYERS


@pytest.mark.parametrize(
    "config", CONFIGS[1:], ids=["moments of 16", "moments of 8, 4 bits", "smooth_tokens", "relative", "block_size"]
)
def test_another_config_between_turns(llama, config):
    cache = filled(llama)
    sale_hf.configure(llama, config)
    for n in range(2):
        check_turn(llama, cache, tokens(1, 128, seed=9 + n))
    assert min(lengths(cache)) >= 576


@pytest.mark.parametrize(
    ("kind", "first"),
    # A static cache made under inference_mode is not written to outside: transformers itself fails.
    [("dynamic", True), ("dynamic", False), ("static", False)],
)
def test_inference_mode_and_no_grad_in_turns(llama, kind, first):
    cache = filled(llama, kind, inference=first)
    for n in range(4):
        check_turn(llama, cache, tokens(1, 128, seed=9 + n), inference=(n % 2 == 0) != first)
    assert lengths(cache) == [896] * LAYERS


def test_a_static_cache_under_inference_mode_alone(llama):
    """Torch counts no writes to its tensors, so nobody knows whether keys are what they were."""
    cache = filled(llama, "static", inference=True)
    with torch.inference_mode():
        overwrite(cache)
    check_turn(llama, cache, tokens(1, 192, seed=9), inference=True)
    assert not any(lengths(cache))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_copies_have_stores_of_their_own(llama, kind):
    cache = filled(llama, kind, chunks=(192, 192))
    copied = copy.deepcopy(cache)
    assert lengths(copied) == lengths(cache) == [384] * LAYERS
    tensors = [[x for codes in stores_of(each).values() for x in codes._stored.tables] for each in (cache, copied)]
    assert not {x.data_ptr() for x in tensors[0]} & {x.data_ptr() for x in tensors[1]}
    for n, each in enumerate((copied, cache, copied, cache)):
        check_turn(llama, each, tokens(1, 128, seed=n))
    assert lengths(copied) == lengths(cache) == [640] * LAYERS
    # Of a cache that changed since: its store is of no use to the copy.
    for layer in cache.layers:
        layer.keys.mul_(2.0)
    assert lengths(copy.deepcopy(cache)) == [0] * LAYERS


def test_layers_that_change_the_keys_they_have_keep_no_codes(llama):
    for kind in ("rounding", "evicting"):
        cache = filled(llama, kind, chunks=(192, 192))
        check_turn(llama, cache, tokens(1, 192, seed=5))
        assert not any(lengths(cache))


def test_a_store_does_not_keep_a_caches_old_keys_alive(llama):
    cache = filled(llama, batch=2)
    old = torch.utils.weak.TensorWeakRef(cache.layers[0].keys)
    roll_rows(cache)
    assert old() is None


def test_rows_that_were_padded_and_go_on(llama):
    cache, mask = cache_of("dynamic", llama), torch.ones(3, 0, dtype=torch.int64)
    for n, ends in enumerate([(192, 192, 192), (192, 100, 192), (128, 128, 90), (128, 128, 128)]):
        more = (torch.arange(max(ends)) < torch.tensor(ends)[:, None]).long()
        mask = torch.cat([mask, more], 1)
        check_turn(llama, cache, tokens(3, max(ends), seed=n), mask)


@settings(stateful_step_count=12)
class History(RuleBasedStateMachine):
    """Turns of a model on a cache, and what may happen to it in between."""

    model = None

    @initialize(kind=st.sampled_from(["dynamic", "dynamic", "static", "rounding", "user"]), data=st.data())
    def begin(self, kind, data):
        if History.model is None:
            History.model = build(LLAMA, sale_hf.NAME, CONFIG, max_position_embeddings=2048)
        sale_hf.configure(self.model, CONFIG)
        self.kind, self.cache = kind, cache_of(kind, self.model)
        self.start(data.draw(st.integers(1, 2), label="batch"), data)

    def start(self, batch, data):
        self.mask = torch.zeros(batch, 0, dtype=torch.int64)
        self.lefts = data.draw(st.just([0] * batch) | st.lists(st.integers(0, 90), min_size=batch, max_size=batch))
        for seed in range(2):
            self.go_on(192, seed)

    def go_on(self, length, seed=0, inference=False, short=0):
        """Read a chunk, whose first row ends `short` tokens before it."""
        if self.length + length > ROOM:
            return
        more = torch.ones(len(self.mask), length, dtype=torch.int64)
        if not self.length:
            more[torch.arange(length) < torch.tensor(self.lefts)[:, None].clamp(max=length - 1)] = 0
        more[0, length - short :] = 0
        self.mask = torch.cat([self.mask, more], 1)
        ids = tokens(len(self.mask), length, seed)
        # A static cache made under inference_mode is not written to outside: transformers itself fails.
        check_turn(self.model, self.cache, ids, self.mask, inference and self.kind != "static")

    @property
    def length(self):
        return self.mask.shape[1]

    def is_writable(self):
        return not self.cache.layers[0].keys.is_inference()

    @rule(
        length=st.sampled_from([64, 128, 192]) | st.integers(33, 200),
        seed=st.integers(0, 9),
        inference=st.booleans(),
        short=st.sampled_from([0, 0, 0, 30]),
    )
    def read(self, length, seed, inference, short):
        self.go_on(length, seed, inference, short)

    @rule(steps=st.integers(1, 3), inference=st.booleans())
    def decode(self, steps, inference):
        for n in range(steps if self.length + steps <= ROOM else 0):
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
            ids = tokens(len(self.mask), 1, n)
            turn(self.model, self.cache, ids, self.mask, inference and self.kind != "static")

    @precondition(lambda self: self.kind != "static")
    @rule(data=st.data())
    def crop(self, data):
        amount = data.draw(st.integers(1, self.length - 1), label="tokens")
        self.cache.crop(-amount)
        self.mask = self.mask[:, : self.length - amount]
        self.go_on(64)

    @rule(data=st.data())
    def reorder(self, data):
        rows = len(self.mask)
        order = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows), label="rows"))
        self.cache.reorder_cache(order)
        self.mask = self.mask[order]
        self.go_on(64)

    @precondition(lambda self: self.kind != "static")
    @rule(data=st.data())
    def select(self, data):
        rows = data.draw(st.lists(st.integers(0, len(self.mask) - 1), min_size=1, max_size=3), label="rows")
        self.cache.batch_select_indices(torch.tensor(rows))
        self.mask = self.mask[rows]
        self.go_on(64)

    @precondition(lambda self: self.kind != "static" and len(self.mask) < 3)
    @rule()
    def repeat(self):
        self.cache.batch_repeat_interleave(2)
        self.mask = self.mask.repeat_interleave(2, 0)
        self.go_on(64)

    @precondition(lambda self: self.is_writable())
    @rule(data=st.data())
    def overwrite(self, data):
        at = data.draw(st.integers(0, self.length - 1), label="key")
        for layer in self.cache.layers:
            layer.keys[:, :, at] += 2.0
        self.go_on(64)

    @precondition(lambda self: self.is_writable())  # transformers 5.17 resets by writing zeros
    @rule(data=st.data())
    def another_prompt(self, data):
        batch = len(self.mask)
        self.cache.reset()
        self.start(batch, data)

    @rule()
    def copied(self):
        self.cache = copy.deepcopy(self.cache)
        self.go_on(64)

    @rule(seed=st.integers(0, 9))
    def a_copy_goes_another_way(self, seed):
        mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 64)], 1)
        if self.length + 64 <= ROOM:
            check_turn(self.model, copy.deepcopy(self.cache), tokens(len(mask), 64, seed), mask)

    @rule(config=st.sampled_from(CONFIGS))
    def configure(self, config):
        sale_hf.configure(self.model, config)
        self.go_on(64)


TestHistory = History.TestCase
