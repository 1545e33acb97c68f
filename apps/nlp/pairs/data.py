"""``PairData``: the base of the data of sources and targets, each pair of one of several groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from apps.base.checks import check_at_least, check_name
from apps.data.array_files import read_texts
from apps.data.loader import as_it_is, in_order
from apps.data.splits import SPLITS, Split
from apps.nlp.predict import given_lines, source_batches
from apps.nlp.text.batches import TokenBatches, TranslationBatch, by_length, cut_by_tokens, evenly
from apps.nlp.text.data import SubwordData
from apps.nlp.text.encoded_pairs import EncodedPairs

_MUCH_PADDING = 0.05


class PairData(SubwordData):
    """Sources and targets in train, validation and test batches of `TranslationBatch`.

    A subclass brings ``groups``.

    Args:
        dataset, root, cache_dir: as in ``SuiteData``.
        max_length: tokens of a side, specials included. Longer ones are cut, and the description counts them.
        subset: use only this many training pairs, sampled by split_seed; subwords are learned only from these.
        temperature: T of sampling among groups, n^(1/T): above 1 small ones come more often.
        tokens_per_batch: maximum of pairs per training batch and process times their longest side.
        eval_tokens_per_batch: in validation, test and prediction.
        predict_lines: lines of predict_file that are read at once, and sorted by length.
        kwargs: ``split_seed``, ``subwords``, ``tokenizer``, ``text``, ``predict_file`` and ``bad_lines`` of
            ``SubwordData``; without text and file a prediction takes the sources of the test split. And
            ``num_workers`` (0 is best, a batch takes about a millisecond) and ``seed`` of ``SuiteData``.

    Attributes:
        noun: a group in messages: "pair" of languages, or "task".
        predict_group: the group that given texts belong to; None: the only one.
    """

    unit = "pairs"
    noun: ClassVar[str]
    predict_group: str | None

    def __init__(
        self,
        dataset: str,
        root: str | None,
        cache_dir: str | None,
        *,
        max_length: int = 256,
        subset: int | None = None,
        temperature: float = 1.0,
        tokens_per_batch: int = 4096,
        eval_tokens_per_batch: int = 4096,
        predict_lines: int = 2048,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, root, cache_dir, **kwargs)
        self.max_length, self.subset, self.temperature = max_length, subset, temperature
        self.tokens_per_batch, self.eval_tokens_per_batch = tokens_per_batch, eval_tokens_per_batch
        self.predict_lines = predict_lines
        check_at_least(
            1,
            tokens_per_batch=tokens_per_batch,
            eval_tokens_per_batch=eval_tokens_per_batch,
            predict_lines=predict_lines,
            subset=subset,
            temperature=temperature,
        )
        check_at_least(4, max_length=max_length)

    @property
    def groups(self) -> tuple[str, ...]:
        """The names of the groups, by number."""
        raise NotImplementedError

    def tags(self) -> Sequence[str] | None:
        """Return the tag that each group's sources begin with; None: there are no tags."""
        return self.groups if self.subwords.languages else None

    # ---- for models and readers of results

    def sources(self, split: str) -> list[str]:
        """Return the source texts of "val" or "test", by ``index_B`` of a batch."""
        return read_texts(self.opened, f"{self._held_out(split)}_source_text")

    def references(self, split: str) -> list[str]:
        """Return the target texts of "val" or "test", by ``index_B`` of a batch."""
        return read_texts(self.opened, f"{self._held_out(split)}_target_text")

    def pair_of(self, split: str) -> list[int]:
        """Return the number of the group of each pair of "val" or "test"."""
        return self.opened[f"{self._held_out(split)}_pair"].tolist()

    # ---- Lightning

    def examples(self, split: Split) -> EncodedPairs:
        """Return a split's pairs; longer sides are cut."""
        return self._pairs(split)

    def batching(self, examples: EncodedPairs) -> dict[str, Any]:
        return {"plan": self._plan(examples), "collate_fn": as_it_is, "draws": False}

    def eval_loader(self, examples: EncodedPairs) -> DataLoader[Any]:
        source_N, target_N = (side.clamp(max=self.max_length + 1).numpy() for side in examples.lengths())
        order = by_length(source_N, target_N, np.arange(len(examples)))
        bounds = cut_by_tokens(np.maximum(source_N, target_N)[order], self.eval_tokens_per_batch)
        # The first few have all lengths: to look at a part of a split is to look at sentences like the others.
        batches = [torch.from_numpy(order[bounds[i] : bounds[i + 1]]) for i in evenly(len(bounds) - 1)]
        return in_order(_Whole(examples, batches), 1, self.num_workers)

    def predict_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return the batches to predict, read as they come by one process; ``target_BL`` is ``BOS_ID`` alone.

        Without text and file, the test split.
        """
        return self.given_loader() if self.is_given else self.test_dataloader()

    def given_batches(
        self, lines: Iterable[str] | None = None, start: int = 0
    ) -> Iterator[tuple[TranslationBatch, list[str]]]:
        """Yield batches of given texts, as `source_batches` makes them with the data's options.

        Args:
            lines: text; None: the value of ``text`` or ``predict_file``.
            start: lines before this one are passed over.

        Raises:
            ValueError: several groups and none of them named; a line that is not text.
        """
        lines = given_lines(self.text, self.predict_file, self.bad_lines) if lines is None else lines
        name, tags = f"predict_{self.noun}", self.tags()
        if self.predict_group is None and len(self.groups) > 1:
            raise ValueError(f"{name} (--data.{name}) must name one of {', '.join(self.groups)}")
        if self.predict_group is not None:
            check_name(name, self.predict_group, self.groups)
        number = 0 if self.predict_group is None else self.groups.index(self.predict_group)
        tag, budget = None if tags is None else tags[number], self.eval_tokens_per_batch
        return source_batches(lines, self.subwords, number, tag, self.max_length, budget, self.predict_lines, start)

    # ---- batches

    def _pairs(self, split: str, positions: Tensor | None = None) -> EncodedPairs:
        subwords, tags = self.subwords, self.tags()
        ids = None if tags is None else [subwords.tag_id(tag) for tag in tags]
        return EncodedPairs(self.opened, split, ids, self.max_length, positions)

    def _plan(self, pairs: EncodedPairs) -> TokenBatches:
        source_N, target_N = (side.clamp(max=self.max_length + 1).numpy() for side in pairs.lengths())
        return TokenBatches(source_N, target_N, self.tokens_per_batch, pairs.groups().numpy(), self.temperature)

    def _drawn(self, count: int) -> np.ndarray:
        """Return the places of ``subset`` of so many training pairs, sorted.

        Raises:
            ValueError: there are not so many.
        """
        if self.subset is None:
            return np.arange(count)
        if self.subset > count:
            raise ValueError(f"subset={self.subset} exceeds the {count:,} training pairs")
        return np.sort(np.random.RandomState(self.split_seed).permutation(count)[: self.subset])

    def describe(self) -> str:
        """Return one line: the pairs of each split, those left out or cut, and how much of an epoch is padding."""
        padding = self._plan(self.examples("train")).padding()
        parts = [super().describe(), f"left out: {self._left_out() or 'none'}"]
        parts.append(f"padding of an epoch: {100 * padding:.1f} %")
        if padding > _MUCH_PADDING:
            parts[-1] += f", less with tokens_per_batch (--data.tokens_per_batch) below {self.tokens_per_batch}"
        for split in SPLITS:
            present = set(self.pair_of(split)) if split != "train" else ()
            if present and (lacking := [group for g, group in enumerate(self.groups) if g not in present]):
                parts.append(f"no {split} pairs of {', '.join(lacking)}")
            source_N, target_N = self.examples(split).lengths()
            if cut := int(((source_N > self.max_length) | (target_N - 1 > self.max_length)).sum()):
                parts.append(f"{cut:,} of more than {self.max_length} tokens are cut ({split})")
        return "; ".join(parts)

    def _left_out(self) -> str:
        """Return how many pairs are left out, by reason and split."""
        return ", ".join(f"{count:,} {reason}" for reason, count in self.opened.info["left_out"].items())

    def _held_out(self, split: str) -> str:
        check_name("split", split, ["val", "test"])
        return split


class _Whole(Dataset[Any]):
    """Whole batches."""

    def __init__(self, pairs: EncodedPairs, batches: list[Tensor]) -> None:
        self.pairs, self.batches = pairs, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitems__(self, numbers: list[int]) -> TranslationBatch:
        (number,) = numbers
        return self.pairs.__getitems__(self.batches[number])
