"""Parallel text for Lightning: the corpora that are known by name, and your own files.

A corpus is read and turned into subword ids once, into memory-mapped files in the cache. The order of an epoch depends
only on (seed, epoch): `apps.data.loader.ResumableLoader` restores it in mid-epoch. sentencepiece is imported where it
is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import numpy as np
import torch

from apps.base.checks import check_name
from apps.data.array_files import ArrayFiles, ArrayWriter
from apps.data.splits import Split
from apps.data.store import identity
from apps.data.subwords import train_subwords
from apps.nlp.pairs.data import PairData
from apps.nlp.text.corpora import Filters, Sizes, collect, parse_pairs
from apps.nlp.text.datasets import NLP_DATASETS, OWN, Corpus, Mnemonic, check_corpus, find_corpus
from apps.nlp.text.encoded_pairs import EncodedPairs, write_pairs

log = logging.getLogger(__name__)

_MANY_LEFT_OUT = 0.25
_NO_LOSS = ("(val)", "(test)", "of validation or test (train)")
"""Endings of reasons for which no training pair is lost."""
_FILTERS = ("that hold ", "of fewer than ", "of more than ", "of a length ratio ", "of the same text ")
"""Beginnings of reasons that the configuration names as filters."""
_LEAST_PAIRS = 100
"""Least number of training pairs that may remain where others are left out."""
_MANY_IDENTICAL = 0.01
"""Share of copied sources in training that harms a translator (Khayrallah and Koehn 2018; Ott et al. 2018)."""


class TranslationData(PairData):
    """Sentence pairs in train, validation and test batches of `TranslationBatch`.

    Args:
        dataset: multi30k, ... (`moesaic data list`), or the format of your own files: moses, tsv or gettext.
        root: folder with your own copy of the dataset's files; nothing is downloaded then. For your own files: the
            folder their names start from, by default the one you are in.
        cache_dir: folder for downloads, subwords and encoded text; default ~/.cache/moesaic.
        pairs: language pairs, such as [en-de, de-en]; a sparse model's tasks, in this order. None: the dataset's first.
        train_files: of yours. Moses: ``train`` for ``train.en`` and ``train.de``, plain or ``.gz``, ``.bz2`` or
            ``.xz``; or with the place of the language and, if each pair has its own files, of the pair:
            ``{pair}/train.{lang}``. TSV: a name or a pattern of ``.tsv`` or ``.txt`` files, also compressed or in a
            ``.zip``. gettext: of ``.mo`` or ``.po`` files.
        val_files: likewise; None: rows of train_files are held out. Of multi30k: another name than ``val``.
        test_files: likewise. Of multi30k: another name than ``test_2016_flickr``, such as ``test_2017_flickr``.
        columns: the languages of the columns of TSV files, "-" for one that is not read; None: as a header line says,
            else source and target. Rows of more columns are skipped, with a warning that counts them.
        mnemonic: of gettext, the mark before the letter that opens a menu entry, which is removed: "_" (GTK), "&" (Qt),
            "~" (LibreOffice) or "none"; None: whichever of these is at the beginning of a word.
        val_size: rows to validate on, or a share of all below 1. Of a split that has files, so many of them by chance;
            None: all. Where rows are held out None is 1000, and no more than a twentieth; 0: none are.
        test_size: likewise.
        corpora: further ones in addition to this one, each with its own files.
        min_words: training pairs with fewer words on a side are left out. Where rows are held out by chance, these
            five hold for all splits.
        max_words: those with more.
        max_ratio: those whose longer side has more than so many times the words of the shorter one.
        without: those with a side in which this regular expression is found, such as ``%|<`` for codes and tags.
        drop_identical: leave out pairs whose two sides are the same text, as untranslated rows of a corpus are.
        predict_pair: the pair that text or predict_file is to be translated in; None: the only one.
        kwargs: of ``PairData``: ``max_length``, ``subset``, ``tokens_per_batch``, ``subwords``, ``text``,
            ``predict_file`` and others. Training pairs longer than ``max_length`` are left out.

    Raises:
        ValueError: an unknown dataset, pair or language, an option out of its range or for another dataset; when the
            data are first needed: missing or unreadable files, unequal numbers of lines, a pair without sentences.

    Example::

        data = TranslationData("multi30k", pairs=["en-de"])
        batch = next(iter(data.train_dataloader()))
        batch.source_BS, batch.target_BL
    """

    noun: ClassVar[str] = "pair"
    from_checkpoint = ("subwords", "pairs")

    def __init__(
        self,
        dataset: str = "multi30k",
        root: str | None = None,
        cache_dir: str | None = None,
        pairs: Sequence[str] | None = None,
        train_files: str | None = None,
        val_files: str | None = None,
        test_files: str | None = None,
        columns: Sequence[str] | None = None,
        mnemonic: Mnemonic | None = None,
        val_size: int | float | None = None,
        test_size: int | float | None = None,
        corpora: Sequence[Corpus] = (),
        min_words: int | None = None,
        max_words: int | None = None,
        max_ratio: float | None = None,
        without: str | None = None,
        drop_identical: bool = False,
        predict_pair: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, root, cache_dir, **kwargs)
        own = Corpus(dataset, root, train_files, val_files, test_files, columns, val_size, test_size, mnemonic)
        self.corpora = (own, *corpora)
        known = NLP_DATASETS.get(dataset)
        if pairs is None and known is not None:
            pairs = known.pairs
        if pairs is None and dataset in OWN:
            raise ValueError(f"dataset={dataset!r} needs pairs (--data.pairs), such as [en-de]")
        self.pairs: tuple[str, ...] = tuple(pairs or ())
        self.predict_pair = self.predict_group = predict_pair
        self.filters = Filters(min_words, max_words, max_ratio, without, drop_identical)
        self._check_options()
        self._read_given(self._targets)

    # ---- for models and readers of results

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages of all pairs, in the order of their first mention."""
        return tuple(dict.fromkeys(language for pair in parse_pairs(self.pairs) for language in pair))

    @property
    def _targets(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(target for _, target in parse_pairs(self.pairs)))

    @property
    def groups(self) -> tuple[str, ...]:
        return self.pairs

    def tags(self) -> Sequence[str] | None:
        targets = [target for _, target in parse_pairs(self.pairs)]
        if not self.subwords.languages and len(set(targets)) > 1:
            raise ValueError(
                f"pairs={list(self.pairs)} have several target languages, and the given subwords no tags to ask for "
                "one: leave subwords out, so that they are learned with tags, or take pairs of one target"
            )
        return targets if self.subwords.languages else None

    # ---- Lightning

    def examples(self, split: Split) -> EncodedPairs:
        """Return a split's pairs; training has none of more than ``max_length`` tokens."""
        pairs = self._pairs(split)
        if split != "train":
            return pairs
        source_N, target_N = pairs.lengths()
        fits = (source_N <= self.max_length) & (target_N - 1 <= self.max_length)
        if bool(fits.all()):
            return pairs
        if not bool(fits.any()):
            raise ValueError(f"max_length={self.max_length} leaves none of the {len(pairs):,} training pairs")
        return self._pairs("train", torch.nonzero(fits).squeeze(1))

    # ---- the encoded corpus

    @property
    def title(self) -> str:
        return f"{self.dataset} {' '.join(self.pairs)}"

    def announce(self) -> None:
        """Log the description, and warn of a corpus that teaches to copy, or of which much is left out unasked."""
        super().announce()
        kept, lost, complaint = self._losses()
        asked = sum(count for reason, count in self.opened.info["left_out"].items() if reason.startswith(_FILTERS))
        if lost - asked > _MANY_LEFT_OUT * (kept + lost):
            log.warning("%s", complaint)
        identical, total = (self.opened.info[name] for name in ("identical", "train_pairs"))
        if identical and identical >= _MANY_IDENTICAL * total:
            log.warning(
                "%s: %s of %s training pairs (%.0f %%) have the same text on both sides: a model learns to copy from "
                "them; drop_identical (--data.drop_identical true) leaves them out",
                self.dataset, f"{identical:,}", f"{total:,}", 100 * identical / total,
            )  # fmt: skip

    def check(self, stage: str | None) -> None:
        """Reject to train on few pairs where it is for the others that are left out."""
        if stage == "fit":
            kept, lost, complaint = self._losses()
            if kept < _LEAST_PAIRS and (kept + lost >= _LEAST_PAIRS or lost > _MANY_LEFT_OUT * (kept + lost)):
                raise ValueError(complaint)

    def _losses(self) -> tuple[int, int, str]:
        """Return how many training pairs remain, how many are left out, and a line that says so and what to do."""
        kept, (source_N, target_N) = len(self.examples("train")), self._pairs("train").lengths()
        reasons = self.opened.info["left_out"].items() if self.subset is None else ()  # a subset is taken from the rest
        filtered = sum(count for reason, count in reasons if not reason.endswith(_NO_LOSS))
        lost = filtered + len(source_N) - kept
        advice = "loosen min_words, max_words, max_ratio or without"
        if lost > 2 * filtered:
            most = np.quantile(torch.maximum(source_N, target_N - 1).numpy(), 0.9, method="higher")
            advice = f"raise max_length (--data.max_length): 90 % of the pairs have at most {most} tokens"
        share = f"{lost:,} of {kept + lost:,} training pairs ({100 * lost / max(1, kept + lost):.0f} %)"
        return kept, lost, f"{self.title}: {share} are left out, and {kept:,} remain: {self._left_out()}; {advice}"

    def _left_out(self) -> str:
        out = [super()._left_out()] if self.opened.info["left_out"] else []
        if long := len(self._pairs("train")) - len(self.examples("train")):
            out.append(f"{long:,} of more than {self.max_length} tokens (train)")
        return ", ".join(out)

    def read(self) -> ArrayFiles:
        files = [find_corpus(corpus, self.pairs, self.cache_dir) for corpus in self.corpora]
        made_from = [
            [[identity(paths) for paths, _ in files], [asdict(corpus) for corpus in self.corpora], self.pairs],
            [asdict(self.filters), self.split_seed, self.subset],
        ]
        return self.stored(made_from, lambda writer: self._write(writer, [read() for _, read in files]))

    def _write(self, writer: ArrayWriter, rows: list[Any]) -> None:
        corpora = {}
        for number, (corpus, parts) in enumerate(zip(self.corpora, rows, strict=True), 1):
            name = f"{corpus.dataset} ({number})" if len(rows) > 1 else corpus.dataset
            corpora[name] = (parts, Sizes(corpus.val_size, corpus.test_size, self.split_seed))
        collected = collect(corpora, self.pairs, self.filters)
        train = collected.splits["train"]
        if self.subset is not None:
            collected.splits["train"] = train = train.take(self._drawn(len(train)))
        tags = self._targets if len(self._targets) > 1 else ()
        subwords = self._given or train_subwords(train.source, train.target, self.tokenizer, tags, self.cache)
        for split, pairs in collected.splits.items():
            write_pairs(writer, split, pairs, subwords, keep_text=split != "train")
        writer.finish(
            {
                "left_out": dict(collected.left_out),
                "identical": train.num_identical(),
                "train_pairs": len(train),
                **self.info_of(subwords),
            }
        )

    def _check_options(self) -> None:
        for corpus in self.corpora:
            check_corpus(corpus, is_read=not self.needs_no_dataset)
        parse_pairs(self.pairs)
        if all(corpus.dataset in NLP_DATASETS for corpus in self.corpora):
            known = dict.fromkeys(lang for corpus in self.corpora for lang in NLP_DATASETS[corpus.dataset].languages)
            for language in self.languages:
                check_name("language", language, list(known))
        if self.predict_pair is not None:
            check_name("predict_pair", self.predict_pair, self.pairs)
