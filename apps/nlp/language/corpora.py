"""Where a language model's text comes from: files of yours, or one language of a parallel corpus."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from apps.base.checks import check_name
from apps.data.documents import documents_in
from apps.data.splits import SPLITS, check_size, count_of, hold_out
from apps.data.store import identity
from apps.data.text_files import AlignedText, clean, named_files
from apps.nlp.text.corpora import Sizes, share_out
from apps.nlp.text.datasets import NLP_DATASETS, find_language

log = logging.getLogger(__name__)

Documents = dict[str, list[list[str]]]
"""The lines of each document of each split."""

_TWENTIETH = 0.05


@dataclass(frozen=True)
class TextCorpus:
    """Text of one kind. Each field is the argument of that name of `TextData`, whose docstring describes it."""

    dataset: str = "text"
    root: str | None = None
    train_files: list[str] | str | None = None
    val_files: list[str] | str | None = None
    test_files: list[str] | str | None = None
    language: str | None = None
    document: Literal["line", "paragraph", "file"] = "line"
    val_size: int | float | None = None
    test_size: int | float | None = None

    def check(self, is_read: bool = True) -> None:
        """Check the fields; without files it ``is_read`` from none.

        Raises:
            ValueError: a value out of its range, or for another kind of corpus.
        """
        check_name("dataset", self.dataset, sorted(["text", *NLP_DATASETS]))
        if self.dataset == "text":
            if self.train_files is None and is_read:
                raise ValueError("dataset='text' needs train_files (--data.train_files)")
            if self.language is not None:
                raise ValueError(f"language={self.language!r} is of a parallel corpus, not of dataset='text'")
            for split in ("val", "test"):
                size, files = getattr(self, f"{split}_size"), getattr(self, f"{split}_files")
                if size is not None and files is not None:
                    raise ValueError(f"{split}_size={size} is of train_files: {split}_files={files!r} are taken whole")
        else:
            for name in ("train_files", "val_files", "test_files"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}={getattr(self, name)!r} is for dataset='text', not {self.dataset!r}")
            check_name("language", self.language or "en", NLP_DATASETS[self.dataset].languages)
            if self.document != "line":
                raise ValueError(f"document={self.document!r} is for dataset='text', not {self.dataset!r}")
        check_name("document", self.document, ["line", "paragraph", "file"])
        for name in ("val_size", "test_size"):
            check_size(name, getattr(self, name))

    def find(self, cache_dir: str | None, seed: int) -> tuple[list[Any], Callable[[], Documents]]:
        """Return plain values that tell the corpus from others, and what reads its documents.

        Args:
            cache_dir: folder for downloads.
            seed: of the held-out documents.

        Raises:
            ValueError: a missing file.
            DataError: no source could deliver.
        """
        options = [self.language or "en", self.document, self.val_size, self.test_size, seed]
        if self.dataset == "text":
            files = {split: named_files(self.root, getattr(self, f"{split}_files")) for split in SPLITS}
            made_from = [[split, identity(paths)] for split, paths in files.items()]
            return [made_from, *options], lambda: self._read_own(files, seed)
        paths, rows = find_language(self.dataset, self.root, self.language or "en", cache_dir)
        return [identity(paths), *options], lambda: self._read_corpus(rows(), seed)

    def _read_own(self, files: Mapping[Any, list[Path]], seed: int) -> Documents:
        """Return the lines of each document of each split."""
        splits = {
            split: [own for path in paths for own in map(_clean, documents_in(path, self.document)) if own]
            for split, paths in files.items()
        }
        lacking = [split for split in ("val", "test") if getattr(self, f"{split}_files") is None]
        documents = splits["train"]
        sizes = {split: _TWENTIETH if (n := getattr(self, f"{split}_size")) is None else n for split in lacking}
        counts = {s: count_of(size, len(documents)) for s, size in sizes.items()}
        if sum(counts.values()) >= max(1, len(documents)):
            asked = ", ".join(f"{split}_size={size}" for split, size in sizes.items())
            raise ValueError(f"{asked}: of {len(documents)} documents in {self.train_files} none is left to train on")
        number: dict[str, int] = {}  # the same text is in one split only
        group_N = np.array([number.setdefault(_key(document), len(number)) for document in documents], np.int64)
        drawn = hold_out(group_N, [counts[split] for split in reversed(lacking)], seed)
        for split, chosen in zip(reversed(lacking), drawn, strict=True):
            splits[split] = [documents[i] for i in chosen]
        held = {_key(document) for split in lacking for document in splits[split]}
        splits["train"] = [document for document in documents if _key(document) not in held]
        given = {"val", "test"} - set(lacking)
        warn_of_learned(splits["train"], {f"{split}_files are in train_files": splits[split] for split in given})
        return splits

    def _read_corpus(self, parts: Mapping[str, Sequence[AlignedText]], seed: int) -> Documents:
        """Return the sentences of each split, each in one split and there once."""
        language, sizes = self.language or "en", Sizes(self.val_size, self.test_size, seed)
        distinct = {
            split: [
                AlignedText({language: [*dict.fromkeys(filter(None, rows.text[language]))]}, rows.name) for rows in own
            ]
            for split, own in parts.items()
        }
        (shared,) = share_out([(distinct, sizes)])
        splits = {
            split: list(dict.fromkeys(line for rows in shared[split] for line in rows.text[language]))
            for split in SPLITS
        }
        held = {*splits["val"], *splits["test"]}
        train = [line for line in splits["train"] if line not in held]
        lines, kept = (sum(len(rows) for own in some.values() for rows in own) for some in (parts, distinct))
        left_out = f"{lines - kept:,} lines that are empty or come again, {len(splits['train']) - len(train):,}"
        log.info("%s in %s: left out: %s of validation or test (train)", self.dataset, language, left_out)
        return {split: [[line] for line in (train if split == "train" else lines)] for split, lines in splits.items()}


def warn_of_learned(train: list[list[str]], held: Mapping[str, list[list[str]]]) -> None:
    """Warn of held-out documents, each list by words that say where they are, that are in training too."""
    learned = {_key(document) for document in train}
    for where, documents in held.items():
        if known := sum(_key(document) in learned for document in documents):
            shared = f"{known:,} of {len(documents):,} documents of {where} too"
            log.warning("%s: what is measured on them is memory", shared)


def _key(document: list[str]) -> str:
    """Return the text of a document, by which equal ones are known."""
    return "\n".join(document)


def _clean(lines: Sequence[str]) -> list[str]:
    return [own for line in lines if (own := clean(line))]
