"""TextData: one stream of documents, cut into blocks of which each token is said once."""

import json
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from apps.data.subwords import EOS_ID, PAD_ID, SubwordConfig
from apps.nlp.language.corpora import TextCorpus
from apps.nlp.language.data import TextData
from apps.nlp.text.readers import catalogs

SMALL = SubwordConfig(vocab_size=290)
TRAIN = ["the dog runs", "the cat sleeps", "", "a bird sings and sings", "the dog sleeps"]


@pytest.fixture
def root(tmp_path):
    (tmp_path / "train.txt").write_text("\n".join(TRAIN))
    (tmp_path / "val.txt").write_text("the bird runs\nthe Ж\n")
    (tmp_path / "test.txt").write_text("the cat\n")
    return tmp_path


def make(root, **options):
    known = {"train_files": "train.txt", "val_files": "val.txt", "test_files": "test.txt", "tokenizer": SMALL}
    known |= {"cache_dir": str(root / "cache"), "root": str(root), "block_size": 8, "batch_size": 2, "seed": 0}
    return TextData(**{**known, **options})


def stream(loader, size: int) -> list[int]:
    """The tokens that are said, in the order of the blocks, and the one that is only read."""
    rows = {i: row for batch in loader for i, row in zip(batch.index_B.tolist(), batch.tokens_BL.tolist(), strict=True)}
    for i in range(len(rows) - 1):
        assert len(rows[i]) == size + 1
        assert rows[i][-1] == rows[i + 1][0]
    return [rows[0][0], *(token for i in range(len(rows)) for token in rows[i][1:] if token != PAD_ID)]


@pytest.mark.parametrize("size, workers", [(1, 0), (8, 1), (1000, 0)])
def test_each_token_is_said_once_and_documents_end(root, size, workers):
    data = make(root, block_size=size, num_workers=workers)
    for split, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
        lines = [line for line in (root / f"{split}.txt").read_text().split("\n") if line]
        expected = [EOS_ID, *(i for row in data.subwords.encode(lines, "target") for i in (*row, EOS_ID))]
        assert stream(loader, size) == expected
        assert data.size(split).tokens == len(expected) - 1
    assert data.size("val") == (2, data.size("val").tokens, 5, len("the bird runs") + len("the Ж".encode()))


def test_epochs_are_shuffled_overfitting_repeats_one_and_subwords_are_of_the_training_text(root):
    loader = make(root, batch_size=1).train_dataloader()
    whole = [batch.index_B.tolist() for batch in loader]
    assert len(whole) > 4
    assert whole != sorted(whole)
    overfitted = make(root, batch_size=1)
    overfitted.trainer = SimpleNamespace(overfit_batches=2)
    assert [b.index_B.tolist() for b in overfitted.train_dataloader()] == sorted(whole)
    data = make(root)
    assert "Ж" not in "".join(data.subwords.pieces(range(data.subwords.size("target")), "target"))
    (root / "other.txt").write_text("zzz\n" * 40)
    other = make(root, train_files="other.txt", subwords=data.subwords)
    assert other.subwords == data.subwords
    assert next(iter(other.train_dataloader())).tokens_BL.max() < data.subwords.size("target")


@pytest.mark.parametrize(
    ("document", "counts"),
    # 20 lines, of which every fourth is empty: 15 lines, 5 paragraphs of three; two such files
    [("line", (24, 3, 3)), ("paragraph", (8, 1, 1)), ("file", (2, 0, 0))],
)
def test_documents_are_held_out_whole(root, document, counts):
    for name in ("a", "b"):
        lines = [f"{name} {i}" if i % 4 < 3 else "" for i in range(20)]
        (root / f"book-{name}.txt").write_text("\n".join(lines) + "\n")
    options = {"train_files": "book-*.txt", "val_files": None, "test_files": None, "document": document}
    data = make(root, val_size=0.1, test_size=0.1, **options)
    assert tuple(data.size(split).documents for split in ("train", "val", "test")) == counts
    assert sum(data.size(split).words for split in ("train", "val", "test")) == 2 * 30
    assert data.size("train") == make(root, val_size=0.1, test_size=0.1, seed=9, **options).size("train")
    if document == "paragraph":
        (batch,) = make(root, val_size=1, test_size=0, block_size=100, **options).val_dataloader()
        (ids,) = batch.tokens_BL.tolist()
        words = data.subwords.decode([ids], "target")[0].split()
        assert [words[0]] * 3 == words[::2]  # three lines of one file, side by side
        assert [int(i) for i in words[1::2]] == list(range(int(words[1]), int(words[1]) + 3))
    with pytest.raises(ValueError, match=r"val_size=0.6, test_size=0.5: of .* none is left to train on"):
        make(root, val_size=0.6, test_size=0.5, **options).setup()


def test_rows_have_a_document_each(root):
    rows = [{"text": text, "url": "x"} for text in ("the dog runs\n\nthe cat sleeps", "", "a bird  sings")]
    (root / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parquet.write_table(pa.Table.from_pylist(rows), root / "train.parquet")
    (root / "train.txt").write_text("the dog runs\nthe cat sleeps\n\na bird  sings\n")
    of_text = make(root, document="paragraph")
    for name in ("train.jsonl", "train.parquet"):
        of_rows = make(root, train_files=name, subwords=of_text.subwords)
        assert of_rows.size("train").documents == of_text.size("train").documents == 2
        assert stream(of_rows.train_dataloader(), 8) == stream(of_text.train_dataloader(), 8)
    parquet.write_table(pa.table({"txt": ["a"]}), root / "train.parquet")
    with pytest.raises(ValueError, match=r'train.parquet, row 1 has no "text"'):
        make(root, train_files="train.parquet").setup()
    (root / "train.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(ValueError, match=r'train.jsonl, line 2 has no "text"'):
        make(root, train_files="train.jsonl").setup()


def test_the_same_text_is_on_one_side_of_a_split(root):
    (root / "train.txt").write_text("\n".join([f"line {i % 30}" for i in range(90)] + ["one more"] * 20))
    data = make(root, val_files=None, test_files=None, val_size=9, test_size=9)

    def lines(loader):
        text = (data.subwords.decode([stream(loader, 8)], "target"))[0]
        return {number.split()[0] for number in text.split("line")[1:]}

    splits = [lines(loader) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())]
    assert [data.size(split).documents for split in ("train", "val", "test")] == [92, 9, 9]  # three texts of three
    assert [len(s) for s in splits] == [24, 3, 3]


def test_which_file_is_of_which_split_is_part_of_what_is_kept_and_a_file_is_read_once(root, caplog):
    both = make(root, train_files=["train.txt", "t*n.txt", "val.txt"], val_files=None, val_size=1)
    assert [both.size(split).documents for split in ("train", "val", "test")] == [5, 1, 1]
    apart = make(root)
    assert [apart.size(split).documents for split in ("train", "val", "test")] == [4, 2, 1]
    # Documents of files that are in training too are told.
    assert not caplog.text
    assert make(root, train_files=["train.txt", "val.txt"]).size("train").documents == 6
    assert "2 of 2 documents of val_files are in train_files too: what is measured" in caplog.text
    assert "test_files" not in caplog.text
    (root / "val.txt").write_text(" a    dog\t \tЖ\n")  # a run of spaces that is read as one is one byte
    assert make(root).size("val")[2:] == (3, len("a dog Ж".encode()))
    data = make(root, test_files=None, test_size=0)
    assert len(data.val_dataloader())
    with pytest.raises(ValueError, match="text has no test tokens: give test_files, or a test_size that"):
        data.test_dataloader()


def test_one_language_of_a_parallel_corpus(root):
    for split in ("train", "val", "test_2016_flickr"):
        for language in ("en", "de"):
            text = f"{split} in {language}\n"
            (root / f"{split}.{language}").write_text(f"{text}{text}another {split}\n")
    german = {**PARALLEL, "language": "de"}
    data = make(root, **german)
    assert [data.size(split).documents for split in ("train", "val", "test")] == [2, 2, 2]  # each sentence once
    assert make(root, **german, val_size=1).size("val").documents == 1
    with pytest.raises(ValueError, match="document='file' is for dataset='text', not 'multi30k'"):
        make(root, **german, document="file")
    (batch,) = make(root, **german, block_size=200).test_dataloader()
    assert data.subwords.decode(batch.tokens_BL.tolist(), "target")[0].startswith("test_2016_flickr in de")


def test_a_language_of_a_corpus_has_its_sentences_whatever_the_others_lack(root, caplog, monkeypatch):
    monkeypatch.setattr(catalogs, "_read_mo", catalogs._read_po)
    # Czech translates 0 to 19, German 10 to 39, of which 10 and 11 are the same.
    for language, numbers in (("cs", range(20)), ("de", range(10, 40))):
        path = root / f"{language}/LC_MESSAGES/gramps.mo"
        path.parent.mkdir(parents=True)
        path.write_text("\n".join(f'msgid "word {i}"\nmsgstr "{language} {max(i, 11)}"' for i in numbers))
    options = {**PARALLEL, "dataset": "gramps"}

    def count(**more):
        data = make(root, **options, **more)
        return [data.size(split).documents for split in ("train", "val", "test")]

    assert count(val_size=4, test_size=2) == [34, 4, 2]  # English: all 40
    with caplog.at_level("INFO"):
        assert count(language="de", val_size=4, test_size=2) == [23, 4, 2]  # 30, of which two say "de 11"
    assert "gramps in de: left out: 1 lines that are empty or come again, 0 of validation or test" in caplog.text


def test_prompts_are_read_one_by_one(root):
    data = make(root, text=["the dog", "", "a"])
    batches = list(data.predict_dataloader())
    assert [b.index_B.tolist() for b in batches] == [[0], [1], [2]]
    first = [EOS_ID, *data.subwords.encode(["the dog"], "target")[0]]
    assert [b.tokens_BL.tolist() for b in batches[:2]] == [[first], [[EOS_ID]]]
    assert batches[0].tokens_BL.dtype == torch.int64
    with pytest.raises(ValueError, match=r"there is nothing to continue: give text \(--data.text\) or predict_file"):
        make(root).predict_dataloader()
    # With given subwords no corpus is needed.
    (root / "prompts.txt").write_text("the dog\n\na\n")
    (root / "train.txt").unlink()
    from_file = make(root, predict_file=str(root / "prompts.txt"), subwords=data.subwords)
    from_file.prepare_data()
    given = [(b.tokens_BL.tolist(), b.index_B.tolist()) for b in from_file.predict_dataloader()]
    assert given == [(b.tokens_BL.tolist(), b.index_B.tolist()) for b in batches]


PARALLEL = {"dataset": "multi30k", "train_files": None, "val_files": None, "test_files": None}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "multi30"}, "dataset='multi30' is not one of .*; did you mean 'multi30k'"),
        ({"dataset": "multi30k"}, "train_files='train.txt' is for dataset='text', not 'multi30k'"),
        ({"train_files": None}, r"dataset='text' needs train_files \(--data.train_files\)"),
        ({"document": "book"}, "document='book' is not one of line, paragraph, file"),
        ({"block_size": 0}, "block_size=0 must be at least 1"),
        ({"val_files": None, "val_size": -1}, "val_size=-1 must not be negative"),
        ({"val_files": None, "val_size": 1.5}, "val_size=1.5 is neither an integer nor a share below 1"),
        ({"val_size": 3}, r"val_size=3 is of train_files: val_files='val\.txt' are taken whole"),
        ({"language": "de"}, "language='de' is of a parallel corpus, not of dataset='text'"),
        ({"text": "a", "predict_file": "-"}, "text and predict_file are both given"),
        ({**PARALLEL, "language": "es"}, "language='es' is not one of en, de, fr, cs"),
        ({"train_files": "nothing.txt"}, r"nothing\.txt is missing"),
        ({"train_files": "empty.txt"}, r"empty\.txt is empty"),
        ({"train_files": "blank.txt"}, r"there is no text to train on in blank\.txt"),
        ({"train_files": "bad.txt"}, r"bad\.txt, line 2: byte 0xe4 is not valid UTF-8"),
    ],
)
def test_impossible_options_and_files_are_refused(root, options, message):
    for name, content in (("empty", b""), ("blank", b"\n\n"), ("bad", b"a\n\xe4\n")):
        (root / f"{name}.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        make(root, **options).setup()


def several(root, **options):
    for name, words in (("law", "court judge"), ("sea", "ship wave wind")):
        lines = (f"{a} {b} {i}" for i in range(20) for a in words.split() for b in words.split())
        (root / f"{name}.txt").write_text("\n".join(lines))
    domains = {name: TextCorpus(root=str(root), train_files=f"{name}.txt", val_size=4) for name in ("law", "sea")}
    known = {"cache_dir": str(root / "cache"), "tokenizer": SMALL, "block_size": 8, "batch_size": 2, "seed": 0}
    return TextData(**{**known, "domains": domains, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"law": 1}}, "weights are of law, and the domains are law, sea: one for each"),
        ({"weights": {"law": 1, "lake": 1}}, "weights are of law, lake, and the domains are law, sea"),
        ({"weights": {"law": -1, "sea": 1}}, r"weights\.law=-1 must not be negative"),
        ({"weights": {"law": 0, "sea": 0}}, "are not finite, or all 0"),
        ({"weights": {"law": 1}, "domains": None, "train_files": "law.txt"}, "and the domains are none"),
        ({"train_files": "law.txt"}, "train_files and their like are of text without domains"),
        ({"domains": {"law": TextCorpus(document="file")}}, "dataset='text' needs train_files"),
    ],
)
def test_impossible_domains_are_refused(root, options, message):
    with pytest.raises(ValueError, match=message):
        several(root, **options)


def test_a_block_is_of_one_domain_and_a_domain_is_as_it_is_alone(root):
    data = several(root)
    alone = [several(root, domains={name: own}, subwords=data.subwords) for name, own in data.domains.items()]
    blocks = [len(own.examples("train")) for own in alone]
    assert data.blocks("train") == {"law": range(blocks[0]), "sea": range(blocks[0], sum(blocks))}
    assert data.size("train").words == 3 * (80 - 4 - 4) + 3 * (180 - 4 - 9)
    for split in ("train", "val"):
        batch = data.examples(split).__getitems__(range(len(data.examples(split))))
        parts = [own.examples(split).__getitems__(range(len(own.examples(split)))) for own in alone]
        assert torch.equal(batch.tokens_BL, torch.cat([part.tokens_BL for part in parts]))
        assert batch.domain_B.tolist() == [0] * len(parts[0].index_B) + [1] * len(parts[1].index_B)
    assert make(root).examples("train")[0].domain_B is None
    batches = list(several(root, eval_batch_size=1).val_dataloader())
    assert sorted(int(batch.index_B) for batch in batches) == list(range(len(batches)))
    assert {int(batch.domain_B) for batch in batches[:4]} == {0, 1}  # the first few are of all
    (root / "law.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"of 0 documents in law\.txt none is left to train on"):
        TextData(domains=data.domains, cache_dir=str(root / "cache")).setup()


def test_an_epoch_has_domains_by_weight_and_no_block_twice(root):
    data = several(root, weights={"law": 3, "sea": 1}, batch_size=7)
    law, sea = (len(own) for own in data.blocks("train").values())
    loader = data.train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.batch_sampler.sampler.set_epoch(epoch)
        batches = list(loader)
        assert len(batches) == len(loader)
        assert all(len(batch.index_B) == 7 for batch in batches[:-1])
        epochs.append(torch.cat([batch.index_B for batch in batches]).tolist())
        assert torch.cat([batch.domain_B for batch in batches]).bincount().tolist() == [law, law // 3]
        assert len({*epochs[-1]}) == law + law // 3
    assert not {i for i in epochs[0] if i >= law} & {i for i in epochs[1] if i >= law}  # the next ones
    assert 2 * (law // 3) <= sea
    only = several(root, weights={"law": 0, "sea": 0.5})
    assert {int(i) for batch in only.train_dataloader() for i in batch.domain_B} == {1}
    assert "\u2581judge" not in only.subwords.pieces(range(only.subwords.size("target")), "target")
    assert len(only.blocks("val")["law"])  # it is evaluated


def test_documents_that_train_in_another_domain_are_told(root, caplog):
    data = several(root)
    data.setup()
    assert not caplog.text
    all_of_sea = TextCorpus(root=str(root), train_files="sea.txt", val_size=0, test_size=0)
    twice = {"sea": data.domains["sea"], "all": all_of_sea}
    several(root, domains=twice, weights={"sea": 1, "all": 0}).setup()
    assert not caplog.text
    several(root, domains=twice).setup()
    assert "4 of 4 documents of sea (val) are in all (train) too: what is measured" in caplog.text
    assert "9 of 9 documents of sea (test) are in all (train) too" in caplog.text
    assert "of all (" not in caplog.text
