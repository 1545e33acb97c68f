"""Plain text for language models: your own files, or one language of a parallel corpus, as one stream of subwords.

The stream of a split is in a memory-mapped file in the cache and is cut into blocks. `apps.data.loader.ResumableLoader`
restores the order of an epoch in mid-epoch.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from apps.base.checks import check_at_least, check_name
from apps.data.array_files import ArrayFiles, ArrayWriter
from apps.data.splits import SPLITS, Split, check_size, count_of, hold_out
from apps.data.store import identity
from apps.data.subwords import EOS_ID, PAD_ID, Subwords, train_subwords
from apps.data.text_files import Rows, documents_of, named_files, num_words, read_lines
from apps.nlp.predict import given_lines
from apps.nlp.text.corpora import Sizes, share_out
from apps.nlp.text.data import SubwordData
from apps.nlp.text.datasets import NLP_DATASETS, find_language
from apps.nlp.text.encoded_pairs import encode

log = logging.getLogger(__name__)


class TextBatch(NamedTuple):
    """B blocks of text.

    Attributes:
        tokens_BL: int64 (B, L), a model reads ``[:, :-1]`` and predicts ``[:, 1:]``. In training and evaluation L is
            the block size plus one, and the last token of a block is the first of the next, so that each token is
            predicted once; the last block of a split is padded with ``PAD_ID``. In prediction: ``EOS_ID`` and the
            prompt.
        index_B: int64 (B,), the block's place in its split, or the prompt's line number.
    """

    tokens_BL: Tensor
    index_B: Tensor  # type: ignore[assignment]  # a batch has no use for tuple.index


class TextSize(NamedTuple):
    """The amount of text in a split, which turns a loss per token into one per word or byte.

    Attributes:
        documents: number of documents.
        tokens: number of tokens to predict: subwords, and ``EOS_ID`` after each document.
        words: number of words, cut at spaces; for scripts without spaces, number of characters.
        bytes: number of UTF-8 bytes, without line ends.
    """

    documents: int
    tokens: int
    words: int
    bytes: int


class _Blocks(Dataset[Any]):
    """The blocks of one stream, read by whole batches."""

    def __init__(self, ids_M: Tensor, block_size: int) -> None:
        self.ids_M, self.block_size = ids_M, block_size

    def __len__(self) -> int:
        return -(-(len(self.ids_M) - 1) // self.block_size)  # no model predicts the first token

    def __getitem__(self, position: int) -> TextBatch:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int] | Tensor) -> TextBatch:
        index_B = torch.as_tensor(positions, dtype=torch.int64)
        at_BL = index_B[:, None] * self.block_size + torch.arange(self.block_size + 1)
        past_BL = at_BL >= len(self.ids_M)
        tokens_BL = self.ids_M[at_BL.clamp_(max=len(self.ids_M) - 1)].long()
        return TextBatch(tokens_BL.masked_fill_(past_BL, PAD_ID), index_B)


_TWENTIETH = 0.05


class TextData(SubwordData):
    """Text in train, validation and test batches of `TextBatch`.

    A stream is ``EOS_ID``, and then each document with ``EOS_ID`` after it.

    Args:
        dataset: "text" for your own files, or a parallel corpus of `moesaic data list`, of which ``language`` is taken,
            each sentence being a document.
        root: folder that the file names start from; or with your own copy of the dataset's files.
        cache_dir: folder for downloads, subwords and encoded text; default ~/.cache/moesaic.
        train_files: your own: a name or a pattern of UTF-8 text files, plain or ``.gz``, or several.
        val_files: likewise; None: documents of train_files are held out.
        test_files: likewise.
        language: of a parallel corpus; None: English.
        document: unit that is kept on one side of a split: each "line", "paragraph" (lines up to an empty one) or
            "file".
        val_size: documents to validate on, or a share of all below 1, if there are no files of them; None: a twentieth;
            of a parallel corpus as of `TranslationData`.
        test_size: likewise.
        block_size: tokens of a block that a model reads.
        batch_size: blocks of a training batch and process.
        eval_batch_size: in validation and test.
        kwargs: ``split_seed``, ``subwords``, ``tokenizer``, ``text``, ``predict_file`` and ``bad_lines`` of
            ``SubwordData``, whose texts are prompts to be continued; ``num_workers`` (0 is enough) and ``seed`` of
            ``SuiteData``.

    Raises:
        ValueError: an option out of its range; when the data are first needed: missing or unreadable files, a split
            without text.

    Example::

        data = TextData(train_files="books/*.txt", document="paragraph", block_size=256)
        batch = next(iter(data.train_dataloader()))
        batch.tokens_BL     # (32, 257)
    """

    unit = "tokens"
    from_checkpoint = ("subwords",)

    def __init__(
        self,
        dataset: str = "text",
        root: str | None = None,
        cache_dir: str | None = None,
        train_files: list[str] | str | None = None,
        val_files: list[str] | str | None = None,
        test_files: list[str] | str | None = None,
        language: str | None = None,
        document: Literal["line", "paragraph", "file"] = "line",
        val_size: int | float | None = None,
        test_size: int | float | None = None,
        block_size: int = 256,
        batch_size: int = 32,
        eval_batch_size: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, root, cache_dir, batch_size=batch_size, eval_batch_size=eval_batch_size, **kwargs)
        self.language, self._language, self.block_size = language, language or "en", block_size
        self.train_files, self.val_files, self.test_files = train_files, val_files, test_files
        self.document, self.val_size, self.test_size = document, val_size, test_size
        self.tokenizer = replace(self.tokenizer, joint=True)  # text has one side
        self._check_options()
        self._read_given()

    # ---- for models and readers of results

    def size(self, split: str) -> TextSize:
        """Return how much text "train", "val" or "test" has."""
        check_name("split", split, SPLITS)
        return TextSize(*self.opened.info["sizes"][split])

    # ---- Lightning

    def sizes(self) -> dict[Split, int]:
        return {split: self.size(split).tokens for split in SPLITS}

    def examples(self, split: Split) -> _Blocks:
        return _Blocks(self.opened[f"{split}_ids"], self.block_size)

    def predict_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return one prompt a batch, read as it comes: a decoder that continues text has no place for padding."""
        if not self.is_given:
            raise ValueError(
                "there is nothing to continue: give text (--data.text) or predict_file (--data.predict_file)"
            )
        return self.given_loader()

    def given_batches(self, start: int = 0) -> Iterator[tuple[TextBatch, list[str]]]:
        """Yield the prompts of ``text`` or ``predict_file``, one a batch, each with its line.

        Args:
            start: lines before this one are passed over.

        Raises:
            ValueError: a file that cannot be read, or a line that is not text.
        """
        return prompt_batches(given_lines(self.text, self.predict_file, self.bad_lines), self.subwords, start)

    # ---- the encoded text

    def read(self) -> ArrayFiles:
        files: Any
        if self.dataset == "text":
            files = [[split, identity(paths)] for split, paths in self._own_files().items()]
            read = self._read_own
        else:
            paths, rows = find_language(self.dataset, self.root, self._language, self.cache_dir)
            files = identity(paths)

            def read() -> dict[str, list[list[str]]]:
                return self._read_corpus(rows())

        made_from = [files, self._language, self.document, self.val_size, self.test_size, self.split_seed]
        return self.stored(made_from, lambda writer: self._write(writer, read()))

    def _own_files(self) -> dict[str, list[Path]]:
        return {split: named_files(self.root, getattr(self, f"{split}_files")) for split in SPLITS}

    def _read_own(self) -> dict[str, list[list[str]]]:
        """Return the lines of each document of each split."""
        splits = {
            split: [own for path in paths for own in documents_of(read_lines(path), self.document)]
            for split, paths in self._own_files().items()
        }
        lacking = [split for split in ("val", "test") if getattr(self, f"{split}_files") is None]
        documents = splits["train"]
        sizes = {split: _TWENTIETH if (n := getattr(self, f"{split}_size")) is None else n for split in lacking}
        counts = {s: count_of(size, len(documents)) for s, size in sizes.items()}
        if sum(counts.values()) >= max(1, len(documents)):
            asked = ", ".join(f"{split}_size={size}" for split, size in sizes.items())
            raise ValueError(f"{asked}: of {len(documents)} documents none is left to train on")
        number: dict[str, int] = {}  # the same text is in one split only
        group_N = np.array([number.setdefault(_key(document), len(number)) for document in documents], np.int64)
        drawn = hold_out(group_N, [counts[split] for split in reversed(lacking)], self.split_seed)
        for split, chosen in zip(reversed(lacking), drawn, strict=True):
            splits[split] = [documents[i] for i in chosen]
        held = {_key(document) for split in lacking for document in splits[split]}
        splits["train"] = [document for document in documents if _key(document) not in held]
        learned = {_key(document) for document in splits["train"]}
        for split in {"val", "test"} - set(lacking):
            known = sum(_key(document) in learned for document in splits[split])
            if known:
                shared = f"{known:,} of {len(splits[split]):,} documents of {split}_files are in train_files too"
                log.warning("%s: what is measured on them is memory", shared)
        return splits

    def _read_corpus(self, parts: Mapping[str, Sequence[Rows]]) -> dict[str, list[list[str]]]:
        """Return the sentences of each split, each in one split and there once."""
        language, sizes = self._language, Sizes(self.val_size, self.test_size, self.split_seed)
        distinct = {
            split: [Rows({language: [*dict.fromkeys(filter(None, rows.text[language]))]}, rows.name) for rows in own]
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

    def _write(self, writer: ArrayWriter, splits: dict[str, list[list[str]]]) -> None:
        if not splits["train"]:
            raise ValueError(f"there is no text to train on in {self.train_files or self.dataset}")
        train = (line for document in splits["train"] for line in document)
        subwords = self._given or train_subwords((), train, self.tokenizer, (), self.cache)
        sizes = {}
        for split, documents in splits.items():
            text = [" ".join(document) for document in documents]
            ids, bounds = encode(text, subwords, "target")
            stream = np.full(len(ids) + len(text) + 1, EOS_ID, np.int32)
            # document i comes after the i + 1 ends before it
            stream[np.arange(len(ids)) + 1 + np.repeat(np.arange(len(text)), np.diff(bounds))] = ids
            writer.save(f"{split}_ids", stream)
            words = sum(map(num_words, text))
            sizes[split] = TextSize(len(text), len(stream) - 1, words, sum(len(line.encode()) for line in text))
        writer.finish({**self.info_of(subwords), "sizes": sizes})

    def _check_options(self) -> None:
        check_name("dataset", self.dataset, sorted(["text", *NLP_DATASETS]))
        if self.dataset == "text":
            if self.train_files is None and not self.needs_no_dataset:
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
            check_name("language", self._language, NLP_DATASETS[self.dataset].languages)
            if self.document != "line":
                raise ValueError(f"document={self.document!r} is for dataset='text', not {self.dataset!r}")
        check_name("document", self.document, ["line", "paragraph", "file"])
        check_at_least(1, block_size=self.block_size)
        for name in ("val_size", "test_size"):
            check_size(name, getattr(self, name))


def prompt_batches(lines: Iterable[str], subwords: Subwords, start: int = 0) -> Iterator[tuple[TextBatch, list[str]]]:
    """Yield each prompt as a batch, with its line; ``index_B`` is its number, from 0, and those before ``start`` lack.

    A decoder that continues text has no place for padding, so each is by itself.
    """
    for number, line in itertools.islice(enumerate(lines), start, None):
        (row,) = subwords.encode([line], "target")
        yield TextBatch(torch.tensor([[EOS_ID, *row]]), torch.tensor([number])), [line]


def _key(document: list[str]) -> str:
    """Return the text of a document, by which equal ones are known."""
    return "\n".join(document)
