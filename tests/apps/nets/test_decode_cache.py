"""Each row of a cache goes on from the past that it was given."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

import core
from apps.data.subwords import BOS_ID
from apps.nets import transformer
from apps.nets.config import TransformerConfig
from apps.nets.transformer import Cache, LanguageModel, TranslationModel

VOCAB = 20
SOURCE = torch.tensor([[5, 6, 7, 3, 0], [8, 9, 10, 11, 3], [4, 3, 0, 0, 0], [12, 13, 3, 0, 0]])
TASKS = torch.tensor([0, 1, 1, 0])
RELATIVE = {"positions": "relative", "relative_buckets": 8, "relative_max_distance": 16}
KINDS = {
    "sinusoidal": {"positions": "sinusoidal"},
    "rotary, shared keys": {"positions": "rotary", "num_kv_heads": 1},
    "relative": RELATIVE,
    "relative, shared keys": {**RELATIVE, "num_heads": 4, "head_dim": 8, "num_kv_heads": 2},
    "attention experts": {"positions": "rotary", "num_heads": 4},
    "attention experts, unequal numbers": {"positions": "learned"},
}
ATTENTION = {
    "attention experts": core.MoEConfig(4, core.TokenChoice(2), core.AttentionExperts(6, 3)),
    "attention experts, unequal numbers": core.MoEConfig(3, core.Threshold(0.4), core.AttentionExperts(4, 1)),
}


def build(kind="sinusoidal"):
    torch.manual_seed(0)
    config = TransformerConfig("nano", dim=16, hidden_dim=16, **KINDS[kind])
    moe = core.MoEConfig(4, core.Task(num_tasks=2, top_k=2))
    model = TranslationModel(config, source_vocab=VOCAB, ffn=moe, attention_moe=ATTENTION.get(kind))
    return model.double().eval()


class Search:
    """Rows with random tokens, and what each of them has read: the oracle of where a row comes from."""

    def __init__(self, model, copies):
        self.model = model
        self.cache = model.start(model.encode(SOURCE, TASKS)).expand(copies)
        self.sentence_R = torch.arange(len(SOURCE)).repeat_interleave(copies)
        self.read_RT = torch.full((len(self.sentence_R), 1), BOS_ID)
        self.random = torch.Generator().manual_seed(1)

    def check(self):
        """One step, which must be that of the whole prefix of each row."""
        logits_RV = self.model.step(self.read_RT[:, -1], self.cache)
        of = self.sentence_R
        assert_close(logits_RV, self.model(SOURCE[of], self.read_RT, TASKS[of])[:, -1])
        assert len(self.cache) == len(of)
        assert self.cache.length == self.read_RT.shape[1]

    def go_on(self, index=None):
        """The rows ``index`` stay, each with a new token of its own."""
        if index is not None:
            assert self.cache.select(index) is self.cache
            self.sentence_R, self.read_RT = self.sentence_R[index], self.read_RT[index]
        token_R = torch.randint(4, VOCAB, (len(self.read_RT), 1), generator=self.random)
        self.read_RT = torch.cat((self.read_RT, token_R), 1)

    def expand(self, copies):
        """Rows of their own for each copy, whose last tokens differ."""
        assert self.cache.expand(copies) is self.cache
        self.sentence_R = self.sentence_R.repeat_interleave(copies)
        self.read_RT = self.read_RT.repeat_interleave(copies, 0)
        self.read_RT[:, -1] = torch.randint(4, VOCAB, (len(self.read_RT),), generator=self.random)

    def reordered(self, sentences):
        """Random rows of these sentences, in groups."""
        K = self.cache.copies
        copy_NK = torch.randint(0, K, (len(sentences), K), generator=self.random)
        return (torch.tensor(sentences)[:, None] * K + copy_NK).flatten()


ALL = [0, 1, 2, 3]
STAYING = {
    "all, in groups of 3": (3, [ALL] * 5),
    # The first is kept, then a gap, then the last moves up; at last one sentence alone; the kept ones reordered.
    "some leave": (1, [ALL, [0, 2, 3], [1, 2], [0, 1], [1]]),
    "copies of some leave": (3, [ALL, [0, 2, 3], [1, 2], [0, 1], [1]]),
    "they change places and come twice": (2, [[3, 1, 0, 2], [1, 1, 0], [2, 0]]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_go_on_from_the_past_that_they_are_given(kind, monkeypatch):
    monkeypatch.setattr(transformer, "SLOTS", 2)  # the cache grows twice
    model, own = build(kind), [*KINDS].index(kind)
    for name in [*STAYING][own % 2 :: 2]:
        copies, order = STAYING[name]
        search = Search(model, copies)
        for sentences in order:
            search.check()
            search.go_on(search.reordered(sentences))
            assert search.cache.num_sentences == len(sentences)
        search.check()


def test_reordering_moves_no_keys_and_what_was_never_written_is_never_read():
    search = Search(build(), copies=3)
    search.check()
    store, memory = search.cache.store, search.cache.memory
    before = store[:, :, :, :1].clone()
    search.go_on(search.reordered([0, 1, 2, 3]))
    assert search.cache.store is store
    assert search.cache.memory is memory
    assert torch.equal(store[:, :, :, :1], before)
    search.cache.select(torch.zeros(0, dtype=torch.int64))  # no row may stay
    assert len(search.cache) == 0
    assert search.model.step(torch.zeros(0, dtype=torch.int64), search.cache).shape == (0, VOCAB)
    # Memory is not cleared where each sentence has as many slots, and is where it has not.
    search = Search(build(), copies=1)
    search.cache.store.fill_(float("nan"))
    for _ in range(2):
        search.check()
        search.go_on()
    search.cache.store[:, :, :, 2:] = float("nan")
    search.expand(3)
    for _ in range(4):
        search.check()
        search.go_on(search.reordered([0, 1, 2, 3]))
    store = torch.full((1, 2, 4, 3, 1), float("nan"))
    cache = Cache(store, num_kv_heads=1, group=1).expand(2)
    assert not cache.store.any()
    assert (len(cache), cache.num_sentences, cache.copies, cache.length) == (8, 4, 2, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_one_row_a_sentence_becomes_several(kind):
    search = Search(build(kind), copies=1)
    for _ in range(2):
        search.check()
        search.go_on()
    search.expand(3)
    for _ in range(3):
        search.check()
        search.go_on(search.reordered([0, 1, 2, 3]))
    with pytest.raises(ValueError, match="the cache has 3 copies of a sentence already"):
        search.cache.expand(2)
    with pytest.raises(ValueError, match="copies=0 must be at least 1"):
        Search(build(), copies=1).cache.expand(0)


def test_a_slot_is_given_away_when_no_copy_goes_on_from_it_and_reaches_no_other():
    cache = Cache(torch.zeros(1, 2, 2, 4, 1), num_kv_heads=1, group=1).expand(2)  # 2 sentences of 2 copies
    slots = []
    for step, parents in enumerate(([0, 1, 2, 3], [0, 0, 2, 3], [1, 0, 3, 2])):
        cache.append()
        cache.length += 1
        slots.append([cache._slot_NKT[..., : step + 1].tolist(), cache.extent])
        cache.select(torch.tensor(parents))
    assert slots[0] == [[[[0], [1]], [[0], [1]]], 2]
    assert slots[1] == [[[[0, 2], [1, 3]], [[0, 2], [1, 3]]], 4]
    # The first sentence's copies both go on from slots 0 and 2, so that 1 and 3 are free; the second's need all four.
    assert slots[2] == [[[[0, 2, 1], [0, 2, 3]], [[0, 2, 4], [1, 3, 5]]], 6]
    assert cache.store.shape[3] == 6
    cache = Cache(torch.zeros(1, 2, 3, 12, 1), num_kv_heads=1, group=1).expand(4)  # 3 sentences of 4 copies
    for _ in range(3):  # each copy goes on from itself
        cache.append()
        cache.length += 1
    assert cache.extent == 12
    cache.select(torch.tensor([0] * 4 + [4] * 4 + [8] * 4))
    cache.append()  # slots 0, 4 and 8 are in use, and now 1, 2, 3 and 5
    cache.length += 1
    assert cache.extent == 9
    cache.store[:, :, 0, 9:] = float("inf")
    cache.select(torch.tensor([8, 9, 10, 11, 4, 5, 6, 7]))  # the last sentence takes the place of the first
    assert cache.store.isfinite().all()


def test_a_step_heeds_the_caches_dtype_and_needs_no_numbers():
    model = build().float()
    cache = model.start(model.encode(SOURCE, TASKS)).expand(2)
    with torch.autocast("cpu", torch.bfloat16):
        model.step(torch.full((8,), BOS_ID), cache)
    assert cache.store.dtype == torch.float32
    with FakeTensorMode():
        torch.manual_seed(0)
        model = LanguageModel(TransformerConfig("nano", dim=16, hidden_dim=16), vocab=VOCAB).eval()
        cache = model.start(3).expand(2)
        for _ in range(2):
            assert model.step(torch.full((6,), BOS_ID), cache).shape == (6, VOCAB)
    assert cache.extent == 4
