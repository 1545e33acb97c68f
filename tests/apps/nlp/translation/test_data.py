"""TranslationData: what reaches a model, what is left out, and what is to be translated."""

import gzip
import itertools
import logging
import pickle
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule
from quiet_trainer import quiet_trainer

from apps.data.subwords import BOS_ID, EOS_ID, PAD_ID, SubwordConfig
from apps.nlp.text.batches import TranslationBatch
from apps.nlp.text.datasets import Corpus
from apps.nlp.translation import data as module
from apps.nlp.translation.data import TranslationData

SMALL = SubwordConfig(vocab_size=320)
NOUNS = {"en": ["dog", "cat", "bird"], "de": ["Hund", "Kater", "Vogel"], "fr": ["chien", "chat", "oiseau"]}
VERBS = {"en": ["runs", "sleeps"], "de": ["rennt", "schläft"], "fr": ["court", "dort"]}


def lines(language: str, first: int, count: int) -> list[str]:
    """Sentence i in a language: noun, verb, and i spelled with as many words as it has digits."""
    noun, verb = NOUNS[language], VERBS[language]
    return [f"{noun[i % 3]} {verb[i % 2]} {' '.join(str(i))}" for i in range(first, first + count)]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes) else ("\n".join(content) + "\n").encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def root(tmp_path):
    for language in NOUNS:
        for split, first, count in (("train", 0, 60), ("val", 100, 8), ("test", 200, 10)):
            write(tmp_path / f"{split}.{language}", lines(language, first, count))
    return tmp_path


def make(root, **options):
    known = {"train_files": "train", "val_files": "val", "test_files": "test", "pairs": ["en-de"], "seed": 0}
    known |= {"tokenizer": SMALL, "tokens_per_batch": 80, "cache_dir": str(root / "cache"), "root": str(root)}
    return TranslationData("moses", **{**known, **options})


def tokens(row: torch.Tensor) -> list[int]:
    return row[row != PAD_ID].tolist()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_training_batch_is_source_and_target_with_their_ends(root, workers):
    data = make(root, num_workers=workers)
    seen = []
    for batch in data.train_dataloader():
        assert batch.source_BS.dtype == batch.target_BL.dtype == batch.pair_B.dtype == torch.int64
        assert max(batch.source_BS.numel(), batch.target_BL.numel()) <= 80
        for source, target, index in zip(batch.source_BS, batch.target_BL, batch.index_B.tolist(), strict=True):
            s, t = tokens(source), tokens(target)
            assert s[-1] == t[-1] == EOS_ID
            assert t[0] == BOS_ID
            assert s == source[: len(s)].tolist()  # padding comes after the end alone
            assert [BOS_ID, EOS_ID] == [i for i in t if i < 4]
            text = data.subwords.decode([s], "source"), data.subwords.decode([t], "target")
            assert text == ([lines("en", 0, 60)[index]], [lines("de", 0, 60)[index]])
            seen.append(index)
    assert sorted(seen) == list(range(60))


def test_evaluation_batches_hold_every_line_and_say_which(root):
    data = make(root, pairs=["en-de", "fr-en"], eval_tokens_per_batch=60)
    assert data.pair_of("test") == [0] * 10 + [1] * 10
    assert data.sources("test") == lines("en", 200, 10) + lines("fr", 200, 10)
    assert data.references("val") == lines("de", 100, 8) + lines("en", 100, 8)
    batches = list(data.test_dataloader())
    assert len(batches) > 2
    longest = [batch.source_BS.shape[1] for batch in batches]
    assert longest != sorted(longest), "the first batches would be the shortest sentences"
    assert all(batch.source_BS.numel() <= 60 for batch in batches)
    index = torch.cat([batch.index_B for batch in batches])
    assert index.sort().values.tolist() == list(range(20))
    for batch in batches:
        decoded = data.subwords.decode([tokens(row)[1:] for row in batch.source_BS], "source")
        assert decoded == [data.sources("test")[i] for i in batch.index_B]
        assert batch.pair_B.tolist() == [data.pair_of("test")[i] for i in batch.index_B]
        assert not batch.empty_B.any()
    assert sorted(i for batch in make(root).predict_dataloader() for i in batch.index_B.tolist()) == list(range(10))
    with pytest.raises(ValueError, match="split='train' is not one of val, test"):
        data.sources("train")


def test_a_source_has_a_tag_where_there_are_several_target_languages(root):
    data = make(root, pairs=["en-de", "en-fr", "fr-de"])
    subwords = data.subwords
    assert subwords.languages == ("de", "fr")
    assert data.languages == ("en", "de", "fr")
    tags = torch.tensor([subwords.tag_id(language) for language in ("de", "fr", "de")])
    seen = set()
    for batch in data.train_dataloader():
        assert torch.equal(batch.source_BS[:, 0], tags[batch.pair_B])
        seen |= set(batch.pair_B.tolist())
    assert seen == {0, 1, 2}
    # subwords without tags could not ask for one of them
    plain = make(root, pairs=["en-de"]).subwords
    with pytest.raises(ValueError, match=r"pairs=\['en-de', 'en-fr'\] have several target languages, and the given"):
        next(iter(make(root, pairs=["en-de", "en-fr"], subwords=plain).train_dataloader()))
    # two sources and one target need none
    assert make(root, pairs=["en-de", "fr-de"]).subwords.languages == ()


def test_subwords_are_learned_from_the_training_side_alone(root):
    for split, language in itertools.product(("val", "test"), ("en", "de")):
        write(root / f"{split}.{language}", ["Ж dog Ω"])
    joint, apart = (make(root, tokenizer=SubwordConfig(vocab_size=320, joint=own)).subwords for own in (True, False))
    for own, side, learned in ((joint, "source", {"ä"}), (apart, "source", set()), (apart, "target", {"ä"})):
        pieces = "".join(own.pieces(range(own.size(side)), side))
        assert {"Ж", "Ω", "ä"} & {*pieces} == learned  # schläft


def test_given_subwords_are_taken_and_need_no_corpus_to_translate(root, tmp_path):
    learned = make(root).subwords
    data = TranslationData("moses", root=str(tmp_path / "nowhere"), train_files="x", pairs=["en-de"], subwords=learned)
    data.text = "dog runs"
    data.prepare_data()
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert learned.decode([tokens(batch.source_BS[0])], "source") == ["dog runs"]
    # another corpus, the same ids
    write(root / "more.en", ["dog zzz"] * 3)
    write(root / "more.de", ["Hund zzz"] * 3)
    data = make(root, train_files="more", subwords=learned)
    assert data.subwords is learned
    batch = next(iter(data.train_dataloader()))
    assert learned.encode(["dog zzz"], "source")[0] == tokens(batch.source_BS[0])[:-1]
    # a model of several target languages keeps its tags when it serves one
    tagged = make(root, pairs=["en-de", "en-fr"]).subwords
    batch = next(iter(make(root, pairs=["en-fr"], subwords=tagged).train_dataloader()))
    assert set(batch.source_BS[:, 0].tolist()) == {tagged.tag_id("fr")}


def test_a_corpus_is_encoded_once_and_anew_when_a_file_or_an_option_changes(root, monkeypatch):
    written, write_pairs = [], module.write_pairs
    monkeypatch.setattr(module, "write_pairs", lambda *a, **k: written.append(a[1]) or write_pairs(*a, **k))
    first = make(root)
    expected = next(iter(first.train_dataloader()))
    assert written == ["train", "val", "test"]
    second = make(root)
    assert second.subwords == first.subwords
    assert all(torch.equal(a, b) for a, b in zip(next(iter(second.train_dataloader())), expected, strict=True))
    assert len(written) == 3
    make(root, subset=20).setup()
    assert len(written) == 6
    write(root / "val.en", lines("en", 300, 8))
    assert make(root).sources("val") == lines("en", 300, 8)
    assert len(written) == 9


class Counting(LightningModule):
    """Keeps the rows of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.steps, self.total = torch.nn.Parameter(torch.zeros(1)), [], 0

    def training_step(self, batch: TranslationBatch) -> torch.Tensor:
        self.steps.append((self.current_epoch, tuple(batch.index_B.tolist())))
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.total = self.trainer.estimated_stepping_batches
        return torch.optim.SGD(self.parameters(), 0.1)


def test_lightning_makes_the_steps_it_foresaw_and_other_batches_each_epoch(root, tmp_path):
    data, model = make(root), Counting()
    quiet_trainer(tmp_path, max_epochs=2).fit(model, train_dataloaders=data.train_dataloader())
    assert model.total == len(model.steps) == 2 * len(data.train_dataloader())
    epochs = [{rows for e, rows in model.steps if e == epoch} for epoch in range(2)]
    assert all(sorted(itertools.chain(*epoch)) == list(range(60)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    overfitted = make(root)
    overfitted.trainer = SimpleNamespace(overfit_batches=2)
    first, second = ([b.index_B.tolist() for b in overfitted.train_dataloader()][:2] for _ in range(2))
    assert first == second
    # Examples are sent to other processes without the corpus.
    pairs = data.examples("train")
    assert len(sent := pickle.dumps(pairs)) < 2000
    assert all(torch.equal(a, b) for a, b in zip(pickle.loads(sent)[7], pairs[7], strict=True))


def test_a_subset_is_drawn_by_the_seed_of_the_split_and_corpora_by_the_temperature(root):
    def chosen(**options):
        data = make(root, subset=20, **options)
        batches = list(data.train_dataloader())
        assert sum(len(b.index_B) for b in batches) == 20
        return sorted(data.subwords.decode([tokens(row) for b in batches for row in b.source_BS], "source"))

    assert chosen() == chosen(seed=5) != chosen(split_seed=1)
    with pytest.raises(ValueError, match="subset=61 exceeds the 60 training pairs"):
        make(root, subset=61).setup()
    write(root / "small.tsv", [*(f"{i} dog\t{i} Hund" for i in range(15)), "I have\ta tab\tIch habe\tein Tab"])
    small = Corpus("tsv", str(root), "small.tsv", val_size=0, test_size=0)
    for temperature, count in ((1.0, 15), (2.0, 25)):  # 60^(1/2) : 15^(1/2) = 2 : 1
        data = make(root, corpora=[small], temperature=temperature)
        indices = torch.cat([batch.index_B for batch in data.train_dataloader()])
        assert len(indices) == 75
        assert int((indices >= 60).sum()) == count  # those of the second corpus come after the first one's
    assert data.sources("test") == lines("en", 200, 10)
    assert "left out: 1 of 4 columns where 2 are expected (train)" in data.describe()


def test_long_pairs_do_not_train_and_are_counted(root, caplog):
    write(root / "train.en", [*lines("en", 0, 60), "", "dog " * 10_000, "cat"])
    write(root / "train.de", [*lines("de", 0, 60), "leer", "Hund", "Kater"])
    write(root / "val.en", [*lines("en", 100, 3), "bird " * 10_000])
    write(root / "val.de", [*lines("de", 100, 3), "Vogel"])
    data = make(root, max_length=20, tokens_per_batch=1)
    with caplog.at_level(logging.INFO):
        data.setup("fit")
        data.setup("fit")  # told once
    assert [r.message for r in caplog.records if r.name == module.__name__] == [
        "moses en-de: 61 train, 4 val, 10 test pairs; left out: 1 with an empty side (train), "
        "1 of more than 20 tokens (train); padding of an epoch: 0.0 %; 1 of more than 20 tokens are cut (val)"
    ]
    widths = [batch.source_BS.shape[1] for batch in data.train_dataloader() for _ in batch.index_B]
    assert (len(widths), max(widths) <= 20) == (61, True)
    # the model reads target[:, :-1], which is as long as a source may be
    for batch in data.val_dataloader():
        assert batch.source_BS.shape[1] <= 20
        assert batch.target_BL.shape[1] <= 21
        assert (batch.source_BS == EOS_ID).sum(1).tolist() == [1] * len(batch.index_B)
    with pytest.raises(ValueError, match="max_length=4 leaves none of the 62 training pairs"):
        make(root, max_length=4).train_dataloader()


def write_long(root, short: int, long: int) -> None:
    for language in ("en", "de"):
        extra = [f"{line}{' and so on' * 20}" for line in lines(language, 300, long)]
        write(root / f"train.{language}", [*lines(language, 0, short), *extra])


def test_many_pairs_left_out_are_told_with_the_option(root, caplog):
    write_long(root, short=157, long=51)  # 8 of them validate
    data = make(root, max_length=30)
    data.setup("fit")
    data.setup("fit")  # told once
    (warning,) = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert warning.startswith(
        "moses en-de: 51 of 200 training pairs (26 %) are left out, and 149 remain: 8 of validation or test (train), "
        "51 of more than 30 tokens (train); raise max_length (--data.max_length): 90 % of the pairs have at most "
    )
    caplog.clear()
    write_long(root, short=158, long=50)  # a quarter
    make(root, max_length=30).setup("fit")
    make(root, subset=90, min_words=5).setup("fit")  # no other number was asked for
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


@pytest.mark.parametrize(
    "short, long, options, advice",
    [
        *((s, n, {}, "raise max_length") for s, n in ((99, 1), (60, 1501), (61, 30))),
        (150, 0, {"min_words": 5}, "loosen min_words, max_words, max_ratio or without"),
        *((s, n, {}, None) for s, n in ((60, 0), (99, 0), (70, 10))),  # a tiny corpus that loses little trains
    ],
)
def test_too_few_pairs_that_remain_are_refused(root, short, long, options, advice):
    write_long(root, short, long)
    data = make(root, max_length=30, **options)
    if advice is None:
        return data.setup("fit")
    with pytest.raises(ValueError, match=rf"^moses en-de: .* training pairs .* are left out, .*; {advice}") as caught:
        data.setup("fit")
    assert "\n" not in str(caught.value)
    return data.setup("test")  # of a model that was trained on others


def test_pairs_of_the_same_text_on_both_sides_are_counted_and_can_be_left_out(root, caplog):
    # 4 of 64 training pairs are copies: 6 %. One of a thousand is no news: a name is the same in both languages.
    for language in ("en", "de"):
        write(root / f"train.{language}", [*lines(language, 0, 60), "Berlin", "Paris", "Rome", "Oslo"])
    data = make(root)
    data.setup("fit")
    data.setup("fit")  # told once
    make(root).setup("fit")  # and again by the next run, which reads nothing anew
    warning = "moses: 4 of 64 training pairs (6 %) have the same text on both sides: a model learns to copy from them; "
    warning += "drop_identical (--data.drop_identical true) leaves them out"
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [warning, warning]
    caplog.clear()
    without = make(root, drop_identical=True)
    without.setup("fit")
    assert len(without._pairs("train")) == 60
    assert "left out: 4 of the same text on both sides (train)" in without.describe()
    for language in ("en", "de"):
        many = [f"{line} {i}" for i in range(5) for line in lines(language, 0, 60)]
        write(root / f"train.{language}", [*many, "Oslo", "Rome"])
    make(root).setup("fit")  # 2 of 302
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_the_padding_of_an_epoch_and_missing_evaluation_pairs_are_told(root):
    # One batch of all pairs is padded to the longest; with a budget of 1 each pair is a batch of its own.
    data = make(root, tokens_per_batch=10_000)
    (batch,) = data.train_dataloader()
    sides = (batch.source_BS, batch.target_BL)
    padding = sum(int((side == PAD_ID).sum()) for side in sides) / sum(side.numel() for side in sides)
    assert padding > 0.05
    told = f"of an epoch: {100 * padding:.1f} %, less with tokens_per_batch (--data.tokens_per_batch) below 10000"
    assert told in data.describe()
    alone = make(root, tokens_per_batch=1).describe()
    assert data.describe().replace(told, "") == alone.replace("of an epoch: 0.0 %", "")
    (root / "test.fr").unlink()
    assert make(root, pairs=["en-de", "en-fr"]).describe().endswith("; no test pairs of en-fr")
    alone = make(root, val_files=None, test_files=None, val_size=0, test_size=0)
    assert list(alone.val_dataloader()) == []
    for loader in (alone.test_dataloader, alone.predict_dataloader):
        with pytest.raises(ValueError, match="moses has no test pairs: give test_files, or a test_size that holds"):
            loader()


def predicted(data, batches):
    """Return the source of each line as text, by its number."""
    text_of = {}
    for batch in batches:
        assert batch.target_BL.tolist() == [[BOS_ID]] * len(batch.index_B)
        for row, index, empty in zip(batch.source_BS, batch.index_B.tolist(), batch.empty_B.tolist(), strict=True):
            ids = tokens(row)
            assert ids[-1] == EOS_ID
            assert empty == (ids == [EOS_ID])
            assert index not in text_of
            text_of[index] = data.subwords.decode([ids], "source")[0]
    return [text_of[i] for i in range(len(text_of))]


def test_every_line_is_in_one_batch_with_its_number_and_cut_if_it_is_long(root, caplog):
    options = {"pairs": ["en-de", "en-fr"], "predict_lines": 7, "eval_tokens_per_batch": 60}
    data = make(root, predict_pair="en-fr", **options)
    texts = [*lines("en", 0, 20), "", "  \t", "a 漢 character", *lines("en", 5, 3), ""]
    read = []
    given = data.given_batches(read.append(text) or f"{text}\r\n" for text in texts)
    batches = [next(given)[0]]
    assert read == texts[:7]  # seven lines are read at a time
    batches += [batch for batch, _ in given]
    assert predicted(data, batches) == [text.strip() for text in texts]
    assert [min(b.index_B.tolist()) // 7 for b in batches] == sorted(min(b.index_B.tolist()) // 7 for b in batches)
    tag = data.subwords.tag_id("fr")
    for batch in batches:
        assert batch.source_BS.numel() <= 60
        assert set(batch.pair_B.tolist()) == {1}
        assert ((batch.source_BS[:, 0] == tag) | batch.empty_B).all()
    with pytest.raises(ValueError, match=r"predict_pair \(--data.predict_pair\) must name one of en-de, en-fr"):
        list(make(root, **options).given_batches(["dog"]))
    data = make(root, max_length=50)
    texts = ["dog", "cat " * 10_000, "bird"]
    first, long, last = predicted(data, (batch for batch, _ in data.given_batches(texts)))
    assert (first, long[:12], last) == ("dog", "cat cat cat ", "bird")
    (warning,) = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    count = len(data.subwords.encode(texts[1:2], "source")[0])
    assert warning == f"line 2 has {count} tokens: it is cut after 49 (max_length=50)"


@pytest.mark.parametrize("size", [2, 2048])
def test_the_lines_before_one_that_is_no_text_come_before_its_error(root, size):
    write(root / "in.txt", b"dog\ncat sleeps\nbird\n\xff\ndog\n")
    data = make(root, predict_file=str(root / "in.txt"), predict_lines=size)
    given = data.given_batches(["dog", "cat sleeps", "bird", "\udce4", "dog"])
    for batches in (iter(data.predict_dataloader()), (batch for batch, _ in given)):
        numbers = set()
        with pytest.raises(ValueError, match=r"line 4.* is not valid UTF-8"):
            while True:
                numbers |= set(next(batches).index_B.tolist())
        assert numbers == {0, 1, 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": ["en-en"]}, "pair 'en-en' translates a language into itself"),
        ({"pairs": None}, r"dataset='moses' needs pairs \(--data.pairs\)"),
        ({"train_files": None}, r"dataset='moses' needs train_files \(--data.train_files\)"),
        ({"max_length": 3}, "max_length=3 must be at least 4"),
        ({"tokens_per_batch": 0}, "tokens_per_batch=0 must be at least 1"),
        ({"temperature": 0.5}, "temperature=0.5 must be at least 1"),
        ({"num_workers": -1}, "num_workers=-1 must not be negative"),
        ({"max_words": 0}, "max_words=0 is not at least 1"),
        ({"text": "a", "predict_file": "b"}, "text and predict_file are both given"),
        ({"predict_pair": "de-en"}, "predict_pair='de-en' is not one of en-de"),
        ({"corpora": [Corpus("tsv")]}, "dataset='tsv' needs train_files"),
        ({"dataset": "multi30"}, "dataset='multi30' is not one of .*; did you mean 'multi30k'"),
        ({"dataset": "multi30k", "pairs": ["en-es"]}, "language='es' is not one of en, de, fr, cs"),
        ({"dataset": "bible", "pairs": ["en-de"], "test_files": "x"}, "test_files='x' is for files of .* for bible"),
    ],
)
def test_impossible_options_are_refused_at_once(root, options, message):
    with pytest.raises(ValueError, match=message):
        TranslationData(**options) if "dataset" in options else make(root, **options)


def test_files_that_do_not_fit_are_refused_when_they_are_needed(root):
    for target, pairs, message in (
        (lines("de", 0, 59), ["en-de"], r"train\.en has 60 lines and .*train\.de has 59"),
        (["Hund"] * 60, ["en-de", "en-cs"], "pair 'en-cs' has no training sentences in moses: nothing is in 'cs'"),
    ):
        write(root / "train.de", target)
        with pytest.raises(ValueError, match=message):
            make(root, pairs=pairs).setup()
    assert not list((root / "cache/text").iterdir())  # nothing half-made is left
