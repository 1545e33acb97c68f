"""Sentence pairs train, validate, test or are left out."""

import random

import pytest

from apps.data.text_files import AlignedText, num_words
from apps.nlp.text.corpora import Filters, Sizes, collect, draw_splits, parse_pairs


def rows(*lines: tuple[str, ...], languages: str = "en de") -> AlignedText:
    columns = zip(*lines, strict=True)
    return AlignedText({lang: list(column) for lang, column in zip(languages.split(), columns, strict=True)}, "made")


def made(*pairs: str) -> object:
    parts = {"train": [rows(("a", ""), ("b", "B"))], "val": [rows(("b", "B"))], "test": []}
    return collect({"made": (parts, Sizes())}, pairs, Filters())


def four_rows(val: float, test: float) -> object:
    return draw_split(rows(*((f"{i}", f"{i}") for i in range(4))), val, test, 0)


LEFT = r"val_size={} and test_size={} leave none of made's 4 rows"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: parse_pairs([]), "pairs is empty"),
        (lambda: parse_pairs(["en-en"]), "pair 'en-en' translates a language into itself"),
        (lambda: parse_pairs(["ende"]), "pair 'ende' is not SOURCE-TARGET"),
        (lambda: parse_pairs(["en-de-fr"]), "pair 'en-de-fr' is not SOURCE-TARGET"),
        (lambda: parse_pairs(["en-de", "en-fr", "en-de"]), "pairs names 'en-de' twice"),
        (lambda: made("en-cs"), "'en-cs' has no training sentences in made: nothing is in 'cs', only in de, en"),
        (lambda: made("en-de"), "pair 'en-de' has no training sentences in made: none is left"),
        (lambda: Filters(max_words=0), "max_words=0 is not at least 1"),
        (lambda: Filters(max_ratio=0.5), "max_ratio=0.5 is not at least 1"),
        (lambda: Filters(min_words=5, max_words=4), "min_words=5 exceeds max_words=4"),
        (lambda: Filters(without="("), r"without='\(' is no regular expression"),
        (lambda: four_rows(2, 2), LEFT.format(2, 2)),
        (lambda: four_rows(0.6, 0.5), LEFT.format(0.6, 0.5)),
        (lambda: four_rows(-1, 0), LEFT.format(-1, 0)),
    ],
)
def test_what_is_wrong_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_pairs_of_both_directions_and_several_corpora_side_by_side():
    pairs = parse_pairs(["en-de", "de-en", "en-pt_BR", "eng_Latn-sr@latin"])
    assert pairs[2:] == (("en", "pt_BR"), ("eng_Latn", "sr@latin"))
    first = {"train": [rows(("a", "A"), ("b", "B"))], "val": [rows(("v", "V"))], "test": []}
    second = {"train": [rows(("c", "C", "K"), languages="en de fr")], "val": [], "test": []}
    collected = collect({"x": (first, Sizes()), "y": (second, Sizes())}, ["en-de", "de-en", "fr-en"], Filters())
    train = collected.splits["train"]
    assert list(zip(train.source, train.target, train.pair, train.corpus, strict=True)) == [
        *(("a", "A", 0, 0), ("b", "B", 0, 0), ("A", "a", 1, 0), ("B", "b", 1, 0)),
        *(("c", "C", 0, 1), ("C", "c", 1, 1), ("K", "c", 2, 1)),
    ]
    val = collected.splits["val"]
    assert list(zip(val.source, val.target, val.pair, strict=True)) == [("v", "V", 0), ("V", "v", 1)]
    assert not collected.left_out


def random_rows(count: int, seed: int) -> AlignedText:
    """Sentences of a small vocabulary, so that many come again on one side or the other."""
    draw = random.Random(seed)
    return rows(*((f"e{draw.randrange(count)}", f"d{draw.randrange(count)}") for _ in range(count)))


def draw_split(own: AlignedText, val: float, test: float, seed: int) -> dict[str, AlignedText]:
    (drawn,) = draw_splits([own], [(val, test)], [seed])
    return drawn


def test_rows_that_share_sentences_stay_together_and_a_draw_is_the_one_it_was():
    # hi-hallo, hi-tag, day-tag are one group of three; letter case and spaces do not count
    chain = [("Hi", "Hallo"), ("hi ", "Tag"), ("Day", "tag")]
    alone = [(f"e{i}", f"d{i}") for i in range(7)]
    for seed in range(10):
        drawn = draw_split(rows(*chain, *alone), 2, 2, seed)
        assert {"Hallo", "Tag", "tag"} <= set(drawn["train"].text["de"])
        assert [len(drawn[name]) for name in ("val", "test")] == [2, 2]
    drawn = draw_split(rows(("a", ""), ("b", ""), ("c", ""), ("d", "")), 1, 1, 0)  # an empty side connects nothing
    assert [len(part) for part in drawn.values()] == [2, 1, 1]
    # Figures in the documents are of these splits.
    drawn = draw_split(random_rows(60, 5), 4, 5, 11)
    assert drawn["val"].text["en"] == ["e53", "e53", "e1", "e53"]
    assert drawn["test"].text["en"] == ["e7", "e8", "e8", "e35", "e26"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_sentence_is_in_two_splits_of_one_or_several_files(seed):
    drawn = draw_split(random_rows(500, seed), 40, 0.1, seed)
    assert {name: len(part) for name, part in drawn.items()} == {"train": 410, "val": 40, "test": 50}
    for side in ("en", "de"):
        assert len(set().union(*(parts := [{*part.text[side]} for part in drawn.values()]))) == sum(map(len, parts))
    draw = random.Random(seed)
    english = [f"e{draw.randrange(300)}" for _ in range(400)]
    # The same English twice, as of {pair}/train.{lang}; a part of it in a small file; and a file that is all training.
    files = [
        rows(*((line, f"{other}{i}") for i, line in enumerate(own)), languages=f"en {other}")
        for other, own in (("de", english), ("fr", english), ("cs", english[:60]), ("ru", english[200:250]))
    ]
    drawn = draw_splits(files, [(20, 0.1), (20, 40), (3, 3), (0, 0)], [seed] * 4)
    sizes = [{name: len(part) for name, part in parts.items()} for parts in drawn]
    assert sizes[0] == sizes[1] == {"train": 340, "val": 20, "test": 40}
    assert sizes[2:] == [{"train": 54, "val": 3, "test": 3}, {"train": 50, "val": 0, "test": 0}]
    of_split = [{line for parts in drawn for line in parts[name].text["en"]} for name in ("train", "val", "test")]
    assert sum(map(len, of_split)) == len(set(english))
    # Files without a sentence in common are drawn as each would be alone, by their seeds.
    apart = [random_rows(100, 1), rows(*((f"x{i}", f"y{i}") for i in range(50)))]
    alone = [draw_split(apart[0], 9, 9, seed), draw_split(apart[1], 0.1, 5, 7)]
    assert draw_splits(apart, [(9, 9), (0.1, 5)], [seed, 7]) == alone
    assert draw_split(apart[0], 9, 9, seed + 1) != alone[0]


def test_what_is_left_out_is_counted_by_words_or_characters():
    train = rows(
        ("kept as it is", "so wie es ist"),
        ("", "leer"),
        ("", ""),  # a missing pair is none that is left out
        ("one", "eins"),
        ("one two three four five six", "eins zwei drei"),
        ("one two", "eins zwei drei vier fünf"),
        ("page %d", "Seite Nummer %d"),
        ("held out", "zurückgehalten"),
        ("held out", "anders gesagt"),  # another translation is another pair
    )
    parts = {"train": [train], "val": [rows(("held out", "zurückgehalten"), ("x", ""))], "test": []}
    collected = collect({"made": (parts, Sizes())}, ["en-de"], Filters(2, 5, max_ratio=2, without="%|<"))
    # One word, not two, is "held out" against: zurückgehalten is caught before the filters.
    assert collected.splits["train"].source == ["kept as it is", "held out"]
    # Evaluation files are taken as they are: one and two words.
    assert collected.splits["val"].source == ["held out"]
    assert collected.left_out == {
        "with an empty side (train)": 1,
        "of fewer than 2 words (train)": 2,
        "of more than 5 words (train)": 1,
        "of a length ratio over 2 (train)": 1,
        "that hold '%|<' (train)": 1,
        "with an empty side (val)": 1,
    }
    texts = {"a b-c  d.": 3, "": 0, "打开 USB 设备": 5, "เปิด": 4, "ファイル": 4, "파일 열기": 2}
    assert {text: num_words(text) for text in texts} == texts
    train = [rows(("Open the file now", "现在打开文件"), ("Open the file now", "打开"))]
    parts = {"train": train, "val": [], "test": []}
    collected = collect({"made": (parts, Sizes())}, ["en-de"], Filters(min_words=3, max_ratio=1.5))
    assert collected.splits["train"].target == ["现在打开文件"]  # six characters are 1.5 times the four words
    assert collected.left_out == {"of fewer than 3 words (train)": 1}


def test_a_pair_that_is_held_out_does_not_train_in_either_direction_or_another_corpus():
    parts = {"train": [rows(("a", "A"), ("b", "B"), ("c", "C"))], "val": [rows(("a", "A"))], "test": [rows(("b", "B"))]}
    collected = collect({"made": (parts, Sizes())}, ["de-en"], Filters())
    assert collected.splits["train"].source == ["C"]
    assert collected.left_out == {"of validation or test (train)": 2}
    # also where the held-out pair is another corpus'
    other = {"train": [rows(("A", "a"), ("d", "D"), languages="de en")], "val": [], "test": []}
    collected = collect({"made": (parts, Sizes()), "other": (other, Sizes())}, ["en-de"], Filters())
    assert collected.splits["train"].source == ["c", "D"]
    lines = [f"e{i}" for i in range(100)]
    german = rows(*((line, f"{line} de") for line in lines))
    french = rows(*((line, f"{line} fr") for line in lines[:50]), languages="en fr")
    for sizes in (Sizes(val=0, test=0), Sizes(val=5, test=5), Sizes()):
        corpora = {"a": ({"train": [german]}, Sizes(val=10, test=10)), "b": ({"train": [french]}, sizes)}
        splits = collect(corpora, ["de-en", "fr-en"], Filters()).splits
        assert [splits[name].pair.count(0) for name in ("val", "test")] == [10, 10]
        train, val, test = (set(splits[name].target) for name in ("train", "val", "test"))
        assert not train & val and not train & test and not val & test  # noqa: PT018


def test_a_share_of_what_the_filters_keep_is_held_out_and_files_that_are_there_are_kept():
    lines = [(f"e{i} " * (i % 4 + 1), f"d{i} " * (i % 4 + 1)) for i in range(40)]

    def sizes(own, filters=None, **more):
        collected = collect({"made": ({"train": [rows(*lines)], **more}, own)}, ["en-de"], filters or Filters())
        return [len(collected.splits[name]) for name in ("train", "val", "test")], collected

    assert sizes(Sizes())[0] == [36, 2, 2]
    assert sizes(Sizes(val=0.25), test=[rows(("t", "T"))])[0] == [30, 10, 1]
    assert sizes(Sizes(val=0), test=[rows(("t", "T"))])[0] == [40, 0, 1]
    # 10 of 40 have three words and 10 have four
    three, collected = sizes(Sizes(val=4, test=5), Filters(min_words=3))
    assert three == [11, 4, 5]
    assert all(len(line.split()) >= 3 for split in collected.splits.values() for line in split.source)
    assert collected.left_out == {"of fewer than 3 words": 20}
    parts = {"train": [rows(("t", "T"))], "val": [rows(*((f"e{i}", f"d{i}") for i in range(50)))], "test": []}
    halves = [collect({"made": (parts, Sizes(val=0.5, seed=s))}, ["en-de"], Filters()).splits["val"] for s in (0, 0, 1)]
    assert [len(half) for half in halves] == [25, 25, 25]
    assert halves[0] == halves[1] != halves[2]
    assert halves[0].source == sorted(halves[0].source, key=lambda line: int(line[1:]))  # in the order of the file


def test_rows_that_are_asked_for_and_cannot_be_held_out_are_an_error_that_names_why(caplog):
    lines = [f"e{i}" for i in range(20)]
    german = AlignedText({"en": lines, "de": [f"{line} de" for line in lines]}, "german")
    french = AlignedText({"en": lines[:19], "fr": [f"{line} fr" for line in lines[:19]]}, "french")
    twice = rows(*((f"t{i}", f"T{j}") for i in range(5) for j in range(5)))

    def sizes(val, test=0):
        corpora = {"a": ({"train": [german]}, Sizes(val, test)), "b": ({"train": [french]}, Sizes(0, 0))}
        splits = collect(corpora, ["en-de", "en-fr"], Filters()).splits
        return [splits[name].pair.count(0) for name in ("val", "test")]

    # One row of the 20 is in no other corpus: the others of german train, as french, which holds none out, does.
    assert sizes(1) == [1, 0]
    assert not caplog.text
    assert sizes(3) == [1, 0]
    warning = "1 of german's 20 rows can be held out: those that share sentences stay together, 19 of french too"
    assert f"val_size=3: {warning}" in caplog.text
    with pytest.raises(ValueError, match=r"^val_size=3: 0 of german's 20 .*, 19 of french too; val_size=0 holds none"):
        sizes(3, 1)
    with pytest.raises(ValueError, match=r"^test_size=3: 0 of made's 25 rows can be held out: those that share sente"):
        collect({"made": ({"train": [twice]}, Sizes(0, 3))}, ["en-de"], Filters())
    caplog.clear()
    collect({"made": ({"train": [twice]}, Sizes())}, ["en-de"], Filters())  # a twentieth, that nobody asked for
    assert "val_size=1: 0 of made's 25 rows can be held out" in caplog.text


def test_rows_that_share_a_sentence_with_given_files_are_not_held_out():
    lines = [(f"e{i}", f"d{i}") for i in range(40)]
    # Of the test file, rows 0 to 19 are of training too, word for word or on one side alone.
    given = rows(*(lines[i] if i % 2 else (f"E{i}", f"other {i}") for i in range(20)))
    for seed in range(3):
        corpora = {"made": ({"train": [rows(*lines)], "test": [given]}, Sizes(val=15, seed=seed))}
        splits = collect(corpora, ["en-de"], Filters()).splits
        assert len(splits["val"]) == 15
        assert not set(splits["val"].source) & {line.lower() for line in splits["test"].source}
    with pytest.raises(ValueError, match=r"made.*val_size=0 holds none out"):
        collect({"made": ({"train": [rows(*lines[:20])], "test": [given]}, Sizes(val=3))}, ["en-de"], Filters())
