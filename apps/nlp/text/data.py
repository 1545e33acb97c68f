"""``SubwordData``: the base of the data of texts in subwords."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import Any, get_args

import torch
from torch.utils.data import DataLoader, IterableDataset

from apps.base.checks import check_name
from apps.data.array_files import ArrayFiles, ArrayWriter
from apps.data.subwords import SubwordConfig, Subwords
from apps.data.suite_data import SuiteData
from apps.nlp.predict import BadLines
from apps.nlp.text.encoded_pairs import STORE
from apps.porting import subwords_of


class SubwordData(SuiteData):
    """Texts in subwords that are learned from the training texts or given, and texts that are given to a model.

    A subclass brings ``given_batches``.

    Args:
        dataset, root, cache_dir: as in ``SuiteData``.
        split_seed: of the held-out rows, and of a subset. Not the run's: runs of other seeds have the same splits.
        subwords: the subwords of a trained model; None: as ``tokenizer`` says.
        tokenizer: how they are learned, from the training texts only; or the file they are in.
        text: inputs of a prediction, one text or several.
        predict_file: file of such texts, one per line; "-" is standard input.
        bad_lines: handling of a line of predict_file that is not UTF-8: an "error"; or its bad bytes are put as U+FFFD
            ("replace"), or it is taken for an empty line ("skip"), and a warning at the end counts them.
        kwargs: of ``SuiteData``.

    Raises:
        ValueError: a value out of its range.
    """

    hold_out = "give {split}_files, or a {split}_size that holds some out"
    superseded = MappingProxyType({"tokenizer": "subwords"})

    def __init__(
        self,
        dataset: str,
        root: str | None,
        cache_dir: str | None,
        *,
        split_seed: int = 0,
        subwords: Subwords | None = None,
        tokenizer: SubwordConfig = SubwordConfig(),
        text: list[str] | str | None = None,
        predict_file: str | None = None,
        bad_lines: BadLines = "error",
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, root, cache_dir, **kwargs)
        self.split_seed, self.tokenizer, self._given = split_seed, tokenizer, subwords
        self.text, self.predict_file, self.bad_lines = text, predict_file, bad_lines
        check_name("bad_lines", bad_lines, get_args(BadLines))
        if text is not None and predict_file is not None:
            raise ValueError("text and predict_file are both given: leave out one of them")

    def _read_given(self, targets: Sequence[str] = ()) -> None:
        """Read the subwords of a file that ``tokenizer`` names, with tags of the languages ``targets``."""
        if self._given is None and self.tokenizer.path is not None:
            self._given = subwords_of(self.tokenizer.path, targets)

    @property
    def subwords(self) -> Subwords:
        """Given, or learned from the training texts. The first use reads these, or finds them in the cache."""
        if self._given is not None:
            return self._given
        info = self.opened.info["subwords"]
        return Subwords(tuple(info["models"]), tuple(info["languages"]))

    @property
    def is_given(self) -> bool:
        """Whether there are texts to predict other than the dataset's."""
        return self.text is not None or self.predict_file is not None

    @property
    def needs_no_dataset(self) -> bool:
        return self._given is not None and self.is_given

    def given_batches(self) -> Iterator[tuple[Any, list[str]]]:
        """Yield the batches of ``text`` or ``predict_file``, each with its lines."""
        raise NotImplementedError

    def given_loader(self) -> DataLoader[Any]:
        """Return the batches of ``text`` or ``predict_file``, read as they come by one process."""
        return DataLoader(_GivenBatches(self), batch_size=None, generator=torch.Generator())

    def stored(self, made_from: list[Any], write: Callable[[ArrayWriter], None]) -> ArrayFiles:
        """Return the encoded texts of the cache, which ``write`` writes if they are missing; see ``EncodedStore``."""
        return STORE.open(
            self.cache,
            self.dataset,
            made_from,
            write,
            learning=asdict(self.tokenizer),
            given=None if self._given is None else self._given.digest,
            digest_of=lambda files: files.info["digest"],
        )

    @staticmethod
    def info_of(subwords: Subwords) -> dict[str, Any]:
        """Return the cache's record of the subwords of encoded texts."""
        return {"subwords": {"models": subwords.models, "languages": subwords.languages}, "digest": subwords.digest}


class _GivenBatches(IterableDataset[Any]):
    """The batches of the texts that are given to predict."""

    def __init__(self, data: SubwordData) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return (batch for batch, _ in self.data.given_batches())
