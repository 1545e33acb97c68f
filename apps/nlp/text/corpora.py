"""Aligned rows to the sentence pairs of each split: which rows train, validate and test, and which are left out.

Draws come from numpy's ``RandomState``, whose stream numpy guarantees to keep: a split is the same on every machine.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from apps.data.splits import SPLITS, check_drawn, connected, count_of
from apps.data.text_files import AlignedText, num_words
from core.fields import Bounds, Checked, Count

LANGUAGE = r"[A-Za-z]{2,8}(?:[_@][A-Za-z0-9]+)*"


@dataclass
class SentencePairs:
    """The sentence pairs of one split, side by side.

    Attributes:
        source, target: their text.
        pair: the number of each pair's language pair.
        corpus: the number of each pair's corpus.
    """

    source: list[str] = field(default_factory=list)
    target: list[str] = field(default_factory=list)
    pair: list[int] = field(default_factory=list)
    corpus: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.source)

    def num_identical(self) -> int:
        """Return how many pairs have the same text on both sides."""
        return sum(source == target for source, target in zip(self.source, self.target, strict=True))

    def take(self, positions: Iterable[int]) -> SentencePairs:
        """Return the pairs at ``positions``."""
        at = list(positions)
        return SentencePairs(
            [self.source[i] for i in at],
            [self.target[i] for i in at],
            [self.pair[i] for i in at],
            [self.corpus[i] for i in at],
        )


@dataclass(frozen=True)
class Filters(Checked):
    """Rules for leaving out training pairs. Files of validation and test pairs are taken as they are.

    Attributes:
        min_words, max_words: words of a side, as `num_words` counts them; None: any number.
        max_ratio: words of the longer side over words of the shorter one; None: any.
        without: regular expression that neither side holds; None: any text.
        drop_identical: leave out pairs whose two sides are the same text.

    Raises:
        ValueError: a value out of its range, or no regular expression.
    """

    min_words: Count | None = None
    max_words: Count | None = None
    max_ratio: Annotated[float, Bounds(1)] | None = None
    without: str | None = None
    drop_identical: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            re.compile(self.without or "")
        except re.error as error:
            raise ValueError(f"without={self.without!r} is no regular expression: {error}") from None
        if self.min_words is not None and self.max_words is not None and self.min_words > self.max_words:
            raise ValueError(f"min_words={self.min_words} exceeds max_words={self.max_words}")

    def reason(self, source: str, target: str) -> str | None:
        """Return why a pair is left out; None: it is not."""
        if not source or not target:
            return "with an empty side"
        if self.drop_identical and source == target:
            return "of the same text on both sides"
        if self.without is not None and any(re.search(self.without, side) for side in (source, target)):
            return f"that hold {self.without!r}"
        if self.min_words is None and self.max_words is None and self.max_ratio is None:
            return None
        short, long = sorted((num_words(source), num_words(target)))
        if self.min_words is not None and short < self.min_words:
            return f"of fewer than {self.min_words} words"
        if self.max_words is not None and long > self.max_words:
            return f"of more than {self.max_words} words"
        if self.max_ratio is not None and long > self.max_ratio * short:
            return f"of a length ratio over {self.max_ratio:g}"
        return None


def parse_pairs(pairs: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Return source and target language of each pair.

    Raises:
        ValueError: no pair, one that is not written as ``en-de``, of a language with itself, or given twice.
    """
    if not pairs:
        raise ValueError("pairs is empty: name at least one, such as en-de")
    if twice := [pair for pair, count in Counter(pairs).items() if count > 1]:
        raise ValueError(f"pairs names {twice[0]!r} twice")
    parsed = []
    for pair in pairs:
        if not (match := re.fullmatch(f"({LANGUAGE})-({LANGUAGE})", pair)):
            raise ValueError(f"pair {pair!r} is not SOURCE-TARGET, two language codes such as en-de or en-pt_BR")
        if match[1] == match[2]:
            raise ValueError(f"pair {pair!r} translates a language into itself")
        parsed.append((match[1], match[2]))
    return tuple(parsed)


@dataclass
class CollectedPairs:
    """All pairs of all corpora.

    Attributes:
        splits: by the name of the split.
        left_out: number of pairs left out, by reason and split.
    """

    splits: dict[str, SentencePairs]
    left_out: Counter[str]


@dataclass(frozen=True)
class Sizes:
    """Rows to validate and to test on: a number, or below 1 a share of all rows.

    Attributes:
        val, test: of a split that has files of its own, number of its rows, chosen at random; None: all of them. Of one
            that has none, number of training rows; None: 1000, and no more than a twentieth.
        seed: of the draw.
    """

    val: int | float | None = None
    test: int | float | None = None
    seed: int = 0


def collect(
    corpora: Mapping[str, tuple[Mapping[str, Sequence[AlignedText]], Sizes]], pairs: Sequence[str], filters: Filters
) -> CollectedPairs:
    """Return the sentence pairs of the wanted language pairs.

    A pair with an empty side is left out of every split. Out of training are left those that a filter names, and those
    that are in validation or test in the same words, in either direction. Where rows are held out by chance, the
    filters come first.

    Args:
        corpora: of each one, by name, the rows of its splits, and how many are to be held out.
        pairs: such as ``en-de``.
        filters: of training pairs.

    Raises:
        ValueError: a pair without training sentences, or sizes that leave none.
    """
    parsed = parse_pairs(pairs)
    splits: dict[str, SentencePairs] = {name: SentencePairs() for name in SPLITS}
    left_out: Counter[str] = Counter()
    for parts, _ in corpora.values():
        for split, files in parts.items():
            for rows in files:
                left_out.update({f"{reason} ({split})": count for reason, count in rows.left_out.items()})
    shared = share_out(list(corpora.values()), lambda rows: _filtered(rows, parsed, filters, left_out))
    held: set[frozenset[tuple[str, str]]] = set()
    for split in reversed(SPLITS):  # the held-out rows are known when training comes
        kept = splits[split]
        rules = filters if split == "train" else Filters()
        for number, parts in enumerate(shared):
            for p, (a, b) in enumerate(parsed):
                for rows in parts.get(split, ()):
                    for source, target in _both(rows, a, b):
                        both = frozenset(((a, source), (b, target)))
                        if reason := rules.reason(source, target):
                            left_out[f"{reason} ({split})"] += 1
                            continue
                        if split != "train":
                            held.add(both)
                        elif both in held:
                            left_out["of validation or test (train)"] += 1
                            continue
                        kept.source.append(source)
                        kept.target.append(target)
                        kept.pair.append(p)
                        kept.corpus.append(number)
    trained = set(splits["train"].pair)
    for p, pair in enumerate(pairs):
        if p not in trained:
            known = {lang for parts in shared for rows in parts.get("train", ()) for lang in rows.text}
            lacking = [lang for lang in parsed[p] if lang not in known]
            why = f"nothing is in {lacking[0]!r}, only in {', '.join(sorted(known))}" if lacking else "none is left"
            raise ValueError(f"pair {pair!r} has no training sentences in {', '.join(corpora)}: {why}")
    return CollectedPairs(splits, left_out)


def _both(rows: AlignedText, a: str, b: str) -> Iterable[tuple[str, str]]:
    """Return both sides of the rows that have at least one."""
    if a not in rows.text or b not in rows.text:
        return ()
    return ((source, target) for source, target in zip(rows.text[a], rows.text[b], strict=True) if source or target)


def share_out(
    corpora: Sequence[tuple[Mapping[str, Sequence[AlignedText]], Sizes]],
    kept: Callable[[AlignedText], AlignedText] = lambda rows: rows,
) -> list[dict[str, list[AlignedText]]]:
    """Return the rows of each corpus' splits: of its own files as many as are wanted, or some training rows.

    Args:
        corpora: of each one the rows of its splits, and how many are to be held out.
        kept: of the training rows those that rows are held out from, and that train then.

    Raises:
        ValueError: sizes that leave nothing to train on, or that ask for rows of which none can be held out.
    """
    shared: list[dict[str, list[AlignedText]]] = []
    training: list[tuple[int, AlignedText, dict[str, int | float]]] = []
    for number, (parts, sizes) in enumerate(corpora):
        shared.append({name: list(rows) for name, rows in parts.items() if name != "train"})
        for name, size in (("val", sizes.val), ("test", sizes.test)):
            if size is not None:
                shared[-1][name] = [_sample(rows, size, sizes.seed) for rows in parts.get(name, ())]
        lacking = [name for name in ("val", "test") if name not in parts]
        for rows in parts.get("train", ()):
            rows = kept(rows) if lacking else rows
            default = min(1000, len(rows) // 20)
            wanted = {name: default if (size := getattr(sizes, name)) is None else size for name in lacking}
            training.append((number, rows, wanted))
        for name in lacking:
            shared[-1][name] = []
    if any(wanted for _, _, wanted in training):
        wants = [(wanted.get("val", 0), wanted.get("test", 0)) for _, _, wanted in training]
        seeds = [corpora[number][1].seed for number, _, _ in training]
        held = [rows for parts in shared for of_split in parts.values() for rows in of_split]
        drawn = draw_splits([rows for _, rows, _ in training], wants, seeds, held)
        for f, (number, own, wanted) in enumerate(training):
            others = [rows for g, (_, rows, _) in enumerate(training) if g != f] + held
            for name, size in wanted.items():
                asked = getattr(corpora[number][1], name)
                _check_drawn(own, others, name, asked, count_of(size, len(own)), len(drawn[f][name]))
    else:
        drawn = [{"train": rows} for _, rows, _ in training]
    for (number, _, wanted), own_splits in zip(training, drawn, strict=True):
        for name in ("train", *wanted):
            shared[number].setdefault(name, []).append(own_splits[name])
    return shared


def _check_drawn(
    own: AlignedText, others: Sequence[AlignedText], split: str, asked: int | float | None, wanted: int, drawn: int
) -> None:
    """Warn of a file of which fewer rows were held out than wanted; raise an error if none were although some were
    asked for."""
    if drawn == wanted:
        return
    known = {(language, _key(line)) for language, lines in own.text.items() for line in lines if line}
    counts = [
        sum(any((language, _key(lines[i])) in known for language, lines in rows.text.items()) for i in range(len(rows)))
        for rows in others
    ]
    of = f"{own.name}'s {len(own):,} rows can be held out: those that share sentences stay together"
    if any(counts):
        most = int(np.argmax(counts))
        of += f", {counts[most]:,} of {others[most].name} too"
    check_drawn(split, asked, wanted, drawn, of)


def _filtered(
    rows: AlignedText, pairs: Sequence[tuple[str, str]], filters: Filters, left_out: Counter[str]
) -> AlignedText:
    """Return the rows of which at least one pair is to be kept."""
    keep = np.zeros(len(rows), bool)
    reasons: list[str | None] = [None] * len(rows)
    for a, b in pairs:
        if a in rows.text and b in rows.text:
            for i, (source, target) in enumerate(zip(rows.text[a], rows.text[b], strict=True)):
                reason = filters.reason(source, target)
                keep[i] |= reason is None
                if source or target:
                    reasons[i] = reason
    left_out.update(reason for i, reason in enumerate(reasons) if reason is not None and not keep[i])
    return _take(rows, np.flatnonzero(keep))


def _sample(rows: AlignedText, size: int | float, seed: int) -> AlignedText:
    count = min(len(rows), count_of(size, len(rows)))
    return _take(rows, np.sort(np.random.RandomState(seed).permutation(len(rows))[:count]))


def draw_splits(
    rows: Sequence[AlignedText],
    sizes: Sequence[tuple[int | float, int | float]],
    seeds: Sequence[int],
    held: Sequence[AlignedText] = (),
) -> list[dict[str, AlignedText]]:
    """Share out the rows of one or several files by chance, so that no sentence, of any language, is in two splits.

    Rows that share a sentence, directly or over others, stay together, whichever files they are in; letter case and
    spaces do not count. Their groups are sampled until a split is full; one that is larger than the space left, in any
    file, stays in training.

    Args:
        rows: all of each file.
        sizes: of each, rows of validation and test, or a share of all below 1.
        seeds: of each one's draw.
        held: of validation and test files; rows that share a sentence with them stay in training.

    Raises:
        ValueError: sizes that leave nothing to train on.
    """
    left_2F = np.zeros((2, len(rows)), np.int64)
    for f, (own, (val_size, test_size)) in enumerate(zip(rows, sizes, strict=True)):
        left_2F[:, f] = count_of(val_size, len(own)), count_of(test_size, len(own))
        if min(val_size, test_size) < 0 or left_2F[:, f].sum() >= max(1, len(own)):
            raise ValueError(
                f"val_size={val_size} and test_size={test_size} leave none of {own.name}'s {len(own):,} rows to "
                "train on"
            )
    part_N = _connected([*rows, *held])
    *of_file, held_N = np.split(part_N, np.cumsum([len(own) for own in rows]))
    num_parts = int(part_N.max(initial=-1)) + 1
    size_PF = np.stack([np.bincount(parts, minlength=num_parts) for parts in of_file], axis=1)
    split_P, stays_P = np.zeros(num_parts, np.int64), np.isin(np.arange(num_parts), held_N)
    # Small files first: of a large one with the same sentences few would be theirs.
    for f in sorted(range(len(rows)), key=lambda f: len(rows[f])):
        own_P = np.unique(of_file[f])
        for part in own_P[np.random.RandomState(seeds[f]).permutation(len(own_P))]:
            if not left_2F[:, f].any():
                break
            for number in (1, 0) if not (split_P[part] or stays_P[part]) else ():  # test first; an earlier draw stays
                if (size_PF[part] <= left_2F[number]).all():
                    split_P[part] = number + 1
                    left_2F[number] -= size_PF[part]
                    break
    return [
        {name: _take(own, np.flatnonzero(split_P[parts] == i)) for i, name in enumerate(SPLITS)}
        for own, parts in zip(rows, of_file, strict=True)
    ]


def _connected(files: Sequence[AlignedText]) -> NDArray[np.int64]:
    """Return the number of each row's group, the rows that share sentences, over all files."""
    known: dict[tuple[str, str], int] = {}
    at: list[int] = []
    sentence: list[int] = []
    n = 0
    for rows in files:
        for language, lines in rows.text.items():
            for i, line in enumerate(lines, n):
                if line:
                    at.append(i)
                    sentence.append(known.setdefault((language, _key(line)), len(known)))
        n += len(rows)
    return connected(np.array(at, np.int64), np.array(sentence, np.int64), n)


def _key(line: str) -> str:
    return " ".join(line.casefold().split())


def _take(rows: AlignedText, positions: NDArray[np.int64]) -> AlignedText:
    at = positions.tolist()
    return AlignedText({language: [lines[i] for i in at] for language, lines in rows.text.items()}, rows.name)
