"""Texts and what is to be written of them for Lightning: tasks that are known by name, and your own files."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from apps.base.checks import check_name
from apps.data.array_files import ArrayFiles, ArrayWriter, read_texts, save_texts
from apps.data.datasets import prepare
from apps.data.documents import json_lines
from apps.data.splits import SPLITS, check_drawn, check_size, connected, count_of, hold_out
from apps.data.store import identity
from apps.data.subwords import train_subwords
from apps.data.text_files import clean, named_files, text_lines
from apps.nlp.pairs.data import PairData
from apps.nlp.predict import given_lines
from apps.nlp.sql.schema import read_schema, serialized
from apps.nlp.text.batches import TranslationBatch
from apps.nlp.text.corpora import SentencePairs
from apps.nlp.text.encoded_pairs import write_pairs
from apps.nlp.text.readers.tables import table_rows
from apps.nlp.text_to_text.datasets import TASK_DATASETS, Row

OWN = ("jsonl", "csv", "lines")
Located = Iterator[tuple[str, Row]]
"""Rows, each after words that say where it is."""


class TextToTextData(PairData):
    """Texts and what is to be written of them, such as summaries, answers or queries, in batches of `TranslationBatch`.

    Args:
        dataset: debian_synopsis, ... (`moesaic data list`), or the format of your own files: jsonl, csv or lines.
        root: folder with your own copy of the dataset's files; nothing is downloaded then. For your own files: the
            folder their names start from, by default the one you are in.
        cache_dir: folder for downloads, subwords and encoded text; default ~/.cache/moesaic.
        train_files: of yours, also compressed. jsonl: a name or a pattern of files with a JSON object a line. csv: of
            tables with a header, by commas, or in a ``.tsv`` by tabs. lines: ``train`` for ``train.source`` and
            ``train.target``, of which line i of one belongs to line i of the other. Rows of validation or test are
            left out.
        val_files: likewise; None: rows of train_files are held out, and those of equal sources, or of an equal column
            ``group``, stay together.
        test_files: likewise.
        source: the column of the texts; of lines the file's ending.
        target: the column of what is to be written; in jsonl it may be a list of several right texts, of which training
            takes the first. An empty text on a side is an error. Other columns of validation and test are kept: `rows`.
        task: the column of the task's name; rows without one have the dataset's name.
        tasks: the tasks that are read, in this order, the model's own; None: all of the training rows.
        language: of debian_synopsis: en, de or fr.
        val_size: rows to validate on, or a share of all below 1. Of a split that has files, so many of them by chance;
            None: all. Where rows are held out None is 1000, and no more than a twentieth; 0: none are.
        test_size: likewise.
        max_length: tokens of a side, specials included; longer ones are cut, and the description counts them.
        predict_task: the task of text or predict_file; None: the only one.
        database: SQLite file that text or predict_file asks: its tables follow each question. It is only read.
        kwargs: of ``PairData``: ``subset``, ``temperature``, ``tokens_per_batch``, ``subwords``, ``text``,
            ``predict_file`` and others.

    Raises:
        ValueError: an unknown dataset, task or language, an option out of its range or for another dataset; when the
            data are first needed: missing or unreadable files, a row without source or target.

    Example::

        data = TextToTextData("jsonl", train_files="notes.jsonl", source="body", target="title")
        batch = next(iter(data.train_dataloader()))
        batch.source_BS, batch.target_BL
    """

    noun: ClassVar[str] = "task"
    from_checkpoint = ("subwords", "tasks")

    def __init__(
        self,
        dataset: str = "debian_synopsis",
        root: str | None = None,
        cache_dir: str | None = None,
        train_files: list[str] | str | None = None,
        val_files: list[str] | str | None = None,
        test_files: list[str] | str | None = None,
        source: str = "source",
        target: str = "target",
        task: str = "task",
        tasks: Sequence[str] | None = None,
        language: str = "en",
        val_size: int | float | None = None,
        test_size: int | float | None = None,
        max_length: int = 512,
        predict_task: str | None = None,
        database: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, root, cache_dir, max_length=max_length, **kwargs)
        check_name("dataset", dataset, sorted([*TASK_DATASETS, *OWN]))
        self.files = {"train": train_files, "val": val_files, "test": test_files}
        if dataset in OWN and train_files is None and not self.needs_no_dataset:
            raise ValueError(f"dataset={dataset!r} needs train_files (--data.train_files)")
        for split, names in self.files.items():
            if names is not None and dataset not in OWN:
                raise ValueError(f"{split}_files={names!r} is for files of yours, not for {dataset}")
        if dataset in TASK_DATASETS:
            check_name("language", language, TASK_DATASETS[dataset].languages or ("en",))
        self.sizes_held = {"val": val_size, "test": test_size}
        for split, size in self.sizes_held.items():
            check_size(f"{split}_size", size)
        self.columns = {"source": source, "target": target, "task": task}
        self.language, self._tasks = language, None if tasks is None else tuple(tasks)
        self.predict_task = self.predict_group = predict_task
        self.database = database
        self._read_given(self._tasks or ())

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks, by number. The first use reads the data, unless they were given."""
        return self._tasks if self._tasks is not None else tuple(self.opened.info["tasks"])

    @property
    def groups(self) -> tuple[str, ...]:
        return self.tasks

    def rows(self, split: str) -> list[Row]:
        """Return the rows of "val" or "test", by ``index_B`` of a batch.

        Each has ``source``, ``task`` and ``references``, a list of the right texts, and the further columns.
        """
        return [json.loads(row) for row in read_texts(self.opened, f"{self._held_out(split)}_row")]

    def given_batches(
        self, lines: Iterable[str] | None = None, start: int = 0
    ) -> Iterator[tuple[TranslationBatch, list[str]]]:
        if self.database is not None:
            tables = serialized(read_schema(self.database))
            asked = given_lines(self.text, self.predict_file, self.bad_lines) if lines is None else lines
            lines = (line + tables for line in asked)
        return super().given_batches(lines, start)

    # ---- the encoded rows

    def read(self) -> ArrayFiles:
        if self.dataset in OWN:
            files = {split: self._named(names) for split, names in self.files.items() if names is not None}
            paths, found = [path for own in files.values() for path in own], {s: self._own(p) for s, p in files.items()}
        else:
            root, known = prepare(self.dataset, self.root, self.cache_dir), TASK_DATASETS[self.dataset]
            read = known.read(root, self.language).items()
            paths, found = known.files(root), {split: self._numbered(split, own) for split, own in read}
        options = [self.columns, self._tasks, self.language, self.sizes_held, self.split_seed, self.subset]

        def write(writer: ArrayWriter) -> None:
            self._write(writer, {s: [self._checked(row, where) for where, row in own] for s, own in found.items()})

        return self.stored([identity(paths), self.files, options], write)

    def _named(self, names: list[str] | str) -> list[Path]:
        """Return the files of a split; of lines, each source is followed by its target."""
        if self.dataset != "lines":
            return named_files(self.root, names)
        endings, found = [f".{self.columns[side]}" for side in ("source", "target")], list[Path]()
        for name in [names] if isinstance(names, str) else names:
            sides = [{str(p).rpartition(end)[0]: p for p in named_files(self.root, name + end)} for end in endings]
            if alone := sorted(sides[0].keys() ^ sides[1].keys()):
                raise ValueError(f"{alone[0]} must have both files, {' and '.join(endings)}: it has one")
            found += [side[stem] for stem in sides[0] for side in sides]
        return found

    def _numbered(self, split: str, rows: Iterable[Row]) -> Located:
        return ((f"{self.dataset} ({split}), row {number}", row) for number, row in enumerate(rows, 1))

    def _own(self, paths: Sequence[Path]) -> Located:
        """Yield where each row of files of one's own is, and the row under the names of columns here."""
        if self.dataset == "lines":
            for source, target in zip(paths[::2], paths[1::2], strict=True):
                both = [list(text_lines(path)) for path in (source, target)]
                if len(both[0]) != len(both[1]):
                    names, counts = f"{source} and {target}", f"{len(both[0]):,} and {len(both[1]):,}"
                    raise ValueError(f"{names} have {counts} lines: line i of one belongs to line i of the other")
                for number, (text, written) in enumerate(zip(*both, strict=True), 1):
                    yield f"{source}, line {number}", {"source": text, "target": written}
            return
        for path in paths:
            for number, row in json_lines(path) if self.dataset == "jsonl" else table_rows(path):
                where, has = f"{path}, line {number}", ", ".join(map(str, row))
                named = {side: row.pop(name) for side, name in self.columns.items() if name in row}
                if lacking := {"source", "target"} - {*named}:
                    side = min(lacking)
                    raise ValueError(f"{where}: no column {self.columns[side]!r} ({side}), only {has}")
                yield where, row | named

    def _checked(self, row: Row, where: str) -> Row:
        """Return a row with clean texts, its right ones as ``references``.

        Raises:
            ValueError: a side is empty or no text, or the task's name cannot be one.
        """
        source, target, task = row.pop("source"), row.pop("target"), row.pop("task", None)
        task = self.dataset if task in (None, "") else str(task)
        references = target if isinstance(target, list) else [target]
        for side, texts in (("source", [source]), ("target", references)):
            if odd := [text for text in texts if not isinstance(text, str | int | float | None)]:
                raise ValueError(f"{where}: the {side} is a {type(odd[0]).__name__}, and not a text")
            if not texts or not all(text is not None and clean(str(text)) for text in texts):
                raise ValueError(f"{where}: the {side} is empty")
        if not re.fullmatch(r"[^<>\s]+", task):
            raise ValueError(f"{where}: task={task!r} has spaces or angle brackets")
        return {**row, "source": clean(str(source)), "task": task, "references": [clean(str(t)) for t in references]}

    def _write(self, writer: ArrayWriter, splits: dict[str, list[Row]]) -> None:
        train, left_out = splits["train"], Counter[str]()
        tasks = self._tasks or tuple(dict.fromkeys(row["task"] for row in train))
        for split, rows in splits.items():
            others = sorted({row["task"] for row in rows} - {*tasks})
            if others and self._tasks is None:
                raise ValueError(f"task {others[0]!r} ({split}) is none of training's: {', '.join(tasks)}")
            splits[split] = [row for row in rows if row["task"] in tasks]
            left_out[f"of other tasks ({split})"] += len(rows) - len(splits[split])
        if lacking := {*tasks} - {row["task"] for row in splits["train"]}:
            known = ", ".join(sorted({row["task"] for row in train}))
            raise ValueError(f"task {min(lacking)!r} has no training rows: there are {known}")
        given = [row for split in splits.keys() - {"train"} for row in splits[split]]
        held = {(row["task"], row["source"], text) for row in given for text in row["references"]}
        train = [row for row in splits["train"] if (row["task"], row["source"], row["references"][0]) not in held]
        if not train:
            raise ValueError(f"{self.dataset}: all training rows are in validation or test, and none is left")
        left_out["of validation or test (train)"] = len(splits["train"]) - len(train)
        splits = self._held({**splits, "train": train})
        if self.subset is not None:
            splits["train"] = [splits["train"][i] for i in self._drawn(len(splits["train"]))]
        pairs = {split: _pairs(splits[split], tasks) for split in SPLITS}
        tags = tasks if len(tasks) > 1 else ()
        texts = pairs["train"].source, pairs["train"].target
        subwords = self._given or train_subwords(*texts, self.tokenizer, tags, self.cache)
        for split, own in pairs.items():
            write_pairs(writer, split, own, subwords, keep_text=split != "train")
            if split != "train":
                save_texts(writer, f"{split}_row", [json.dumps(row, ensure_ascii=False) for row in splits[split]])
        writer.finish({"left_out": {k: n for k, n in left_out.items() if n}, "tasks": tasks, **self.info_of(subwords)})

    def _held(self, splits: Mapping[str, list[Row]]) -> dict[str, list[Row]]:
        """Return the rows of all splits: those that have none get some of training, by whole groups."""
        rows, held = splits["train"], {**splits}
        for split, size in self.sizes_held.items():
            if split in splits and size is not None:
                count = min(count_of(size, len(splits[split])), len(splits[split]))
                chosen = np.random.RandomState(self.split_seed).permutation(len(splits[split]))[:count]
                held[split] = [splits[split][i] for i in np.sort(chosen)]
        lacking = [split for split in self.sizes_held if split not in splits]
        default = min(1000, len(rows) // 20)
        sizes = [default if (size := self.sizes_held[s]) is None else count_of(size, len(rows)) for s in lacking]
        if sum(sizes) >= len(rows):
            asked = " and ".join(f"{split}_size={self.sizes_held[split]}" for split in lacking)
            raise ValueError(f"{asked} leave none of the {len(rows):,} rows to train on")
        places = hold_out(_groups(rows), sizes, self.split_seed)
        of = f"{self.dataset}'s {len(rows):,} rows can be held out: those of one source or group stay together"
        for split, wanted, own in zip(lacking, sizes, places, strict=True):
            check_drawn(split, self.sizes_held[split], wanted, len(own), of)
        held |= {split: [rows[i] for i in own] for split, own in zip(lacking, places, strict=True)}
        out = {i for own in places for i in own.tolist()}
        return {**held, "train": [row for i, row in enumerate(rows) if i not in out]}


def _groups(rows: Sequence[Row]) -> np.ndarray:
    """Return the group of each row, int64 (N,): rows of one source, or of one ``group``, are together."""
    keys: dict[tuple[str, str], int] = {}
    known = [
        (i, keys.setdefault((name, str(row[name]).casefold()), len(keys)))
        for i, row in enumerate(rows)
        for name in ("source", "group")
        if row.get(name) not in (None, "")
    ]
    at_L, key_L = np.array(known, np.int64).reshape(-1, 2).T
    return connected(at_L, key_L, len(rows))


def _pairs(rows: Iterable[Row], tasks: Sequence[str]) -> SentencePairs:
    sides = [(row["source"], row["references"][0], tasks.index(row["task"]), 0) for row in rows]
    return SentencePairs(*map(list, zip(*sides, strict=True))) if sides else SentencePairs()
