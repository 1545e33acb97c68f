"""Plain text for language models: one corpus, or several domains, each as one stream of subwords.

The streams of a split are in a memory-mapped file in the cache and are cut into blocks.
`apps.data.loader.ResumableLoader` restores the order of an epoch in mid-epoch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from apps.base.checks import check_at_least, check_name
from apps.data.array_files import ArrayFiles, ArrayWriter
from apps.data.loader import as_it_is, in_order
from apps.data.splits import SPLITS, Split
from apps.data.subwords import EOS_ID, PAD_ID, Subwords, train_subwords
from apps.data.text_files import num_words
from apps.nlp.language.corpora import Documents, TextCorpus, warn_of_learned
from apps.nlp.predict import given_lines
from apps.nlp.text.batches import WholeBatches, endless, evenly
from apps.nlp.text.data import SubwordData
from apps.nlp.text.encoded_pairs import encode


class TextBatch(NamedTuple):
    """B blocks of text.

    Attributes:
        tokens_BL: int64 (B, L), a model reads ``[:, :-1]`` and predicts ``[:, 1:]``. In training and evaluation L is
            the block size plus one, and the last token of a block is the first of the next, so that each token is
            predicted once; the last block of a split is padded with ``PAD_ID``. In prediction: ``EOS_ID`` and the
            prompt.
        index_B: int64 (B,), the block's place in its split, or the prompt's line number.
        domain_B: int64 (B,), the domain's place among the data's; None: the text has no known domain.
    """

    tokens_BL: Tensor
    index_B: Tensor  # type: ignore[assignment]  # a batch has no use for tuple.index
    domain_B: Tensor | None = None


class TextSize(NamedTuple):
    """The amount of text in a split, which turns a loss per token into one per word or byte.

    Attributes:
        documents: number of documents.
        tokens: number of tokens to predict: subwords, and ``EOS_ID`` after each document.
        words: number of words, cut at spaces; for scripts without spaces, number of characters.
        bytes: number of UTF-8 bytes of what is encoded, without line ends.
    """

    documents: int
    tokens: int
    words: int
    bytes: int


class _Blocks(Dataset[Any]):
    """The blocks of the streams of D domains, one after the other, read by whole batches.

    Args:
        ids_M: the streams.
        tokens: number of tokens to predict of each domain, one less than its stream has.
        block_size: tokens to predict of a block.
        is_named: batches tell the domain.
    """

    def __init__(self, ids_M: Tensor, tokens: Sequence[int], block_size: int, is_named: bool) -> None:
        self.ids_M, self.block_size, self.is_named = ids_M, block_size, is_named
        self.counts = [-(-number // block_size) for number in tokens]  # no model predicts a stream's first token
        self.start_D = torch.tensor([0, *itertools.accumulate(number + 1 for number in tokens)])
        self.first_D = torch.tensor([0, *itertools.accumulate(self.counts)])

    def __len__(self) -> int:
        return sum(self.counts)

    def __getitem__(self, position: int) -> TextBatch:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int] | Tensor) -> TextBatch:
        index_B = torch.as_tensor(positions, dtype=torch.int64)
        domain_B = torch.searchsorted(self.first_D, index_B, right=True) - 1
        at_B = self.start_D[domain_B] + (index_B - self.first_D[domain_B]) * self.block_size
        at_BL = at_B[:, None] + torch.arange(self.block_size + 1)
        past_BL = at_BL >= self.start_D[domain_B + 1][:, None]
        tokens_BL = self.ids_M[at_BL.clamp_(max=len(self.ids_M) - 1)].long()
        return TextBatch(tokens_BL.masked_fill_(past_BL, PAD_ID), index_B, domain_B if self.is_named else None)


class _Shares:
    """Training batches of blocks of each domain in given shares: an `apps.data.loader.BatchPlan`.

    An epoch ends before a block of any domain would come twice; the next one goes on with the blocks left over.

    Args:
        counts: blocks of each domain.
        weights: of each domain, in any unit; one of 0 is not trained on.
        batch_size: blocks of a batch.
    """

    def __init__(self, counts: Sequence[int], weights: Sequence[float], batch_size: int) -> None:
        epoch = min(count / weight for count, weight in zip(counts, weights, strict=True) if weight)
        self.quotas = [max(1, int(epoch * weight)) if weight else 0 for weight in weights]
        self.counts, self.batch_size = counts, batch_size

    def __len__(self) -> int:
        return -(-sum(self.quotas) // self.batch_size)

    def batches(self, seed: int, epoch: int) -> Sequence[Tensor]:
        starts = itertools.accumulate(self.counts, initial=0)
        drawn = [
            start + endless(count, epoch * quota, quota, (seed, 1, domain))
            for domain, (start, count, quota) in enumerate(zip(starts, self.counts, self.quotas, strict=False))
            if quota
        ]
        order = np.random.default_rng((seed, 0, epoch)).permutation(np.concatenate(drawn))
        return torch.from_numpy(order).split(self.batch_size)


class TextData(SubwordData):
    """Text in train, validation and test batches of `TextBatch`.

    A stream is ``EOS_ID``, and then each document with ``EOS_ID`` after it.

    Args:
        dataset: "text" for your own files, or a parallel corpus of `moesaic data list`, of which ``language`` is taken,
            each sentence being a document.
        root: folder that the file names start from; or with your own copy of the dataset's files.
        cache_dir: folder for downloads, subwords and encoded text; default ~/.cache/moesaic.
        train_files: your own: a name or a pattern of UTF-8 text files, plain or ``.gz``, or several; of ``.jsonl`` and
            ``.parquet`` the ``text`` of each row is a document.
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
        domains: instead of one text several by name, each a `TextCorpus` with files and options of its own. A block is
            of one domain, which routers see; validation and test tell the perplexity of each.
        weights: share of each domain in the training blocks, in any unit; a domain of 0 is only evaluated. An epoch
            ends before a block would come twice. None: all blocks of all domains.
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
        domains: dict[str, TextCorpus] | None = None,
        weights: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, root, cache_dir, batch_size=batch_size, eval_batch_size=eval_batch_size, **kwargs)
        files = (train_files, val_files, test_files)
        self.own = TextCorpus(dataset, root, *files, language, document, val_size, test_size)
        self.block_size, self.domains, self.weights = block_size, domains, weights
        self.tokenizer = replace(self.tokenizer, joint=True)  # text has one side
        self._check_options()
        self._read_given()

    # ---- for models and readers of results

    def size(self, split: str) -> TextSize:
        """Return how much text "train", "val" or "test" has."""
        check_name("split", split, SPLITS)
        return TextSize(*map(sum, zip(*self.opened.info["sizes"][split], strict=True)))

    def blocks(self, split: Split) -> dict[str, range]:
        """Return the places of each domain's blocks in a split; nothing if the text has no domains."""
        first = self.examples(split).first_D.tolist()
        return {name: range(*ends) for name, ends in zip(self.domains or (), itertools.pairwise(first), strict=False)}

    # ---- Lightning

    def sizes(self) -> dict[Split, int]:
        return {split: self.size(split).tokens for split in SPLITS}

    def examples(self, split: Split) -> _Blocks:
        tokens = [TextSize(*size).tokens for size in self.opened.info["sizes"][split]]
        return _Blocks(self.opened[f"{split}_ids"], tokens, self.block_size, bool(self.domains))

    def batching(self, examples: _Blocks) -> dict[str, Any]:
        if self.weights is None:
            return super().batching(examples)
        plan = _Shares(examples.counts, [self.weights[name] for name in self.corpora], self.batch_size or 1)
        return {"plan": plan, "collate_fn": as_it_is, "draws": False}

    def eval_loader(self, examples: _Blocks) -> DataLoader[Any]:
        batches = torch.arange(len(examples)).split(self.eval_batch_size or 1)
        # The first few batches are of all domains.
        return in_order(WholeBatches(examples, [batches[i] for i in evenly(len(batches))]), 1, self.num_workers)

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

    @property
    def corpora(self) -> Mapping[str, TextCorpus]:
        """The text's domains; if it has none, the one corpus by its name."""
        return self.domains or {self.dataset: self.own}

    def read(self) -> ArrayFiles:
        found = {name: own.find(self.cache_dir, self.split_seed) for name, own in self.corpora.items()}
        made_from = [[name, made] for name, (made, _) in found.items()] + [self._trained]
        return self.stored(made_from, lambda writer: self._write(writer, {n: read() for n, (_, read) in found.items()}))

    @property
    def _trained(self) -> list[str]:
        return [name for name in self.corpora if self.weights is None or self.weights[name]]

    def _write(self, writer: ArrayWriter, texts: dict[str, Documents]) -> None:
        for name in self._trained:
            if not texts[name]["train"]:
                source = self.corpora[name].train_files or self.corpora[name].dataset
                raise ValueError(f"{name}: there is no text to train on in {source}")
        for name in self._trained if len(texts) > 1 else ():  # each corpus is split by itself
            held = ((f"{o} ({split})", texts[o][split]) for o in texts if o != name for split in ("val", "test"))
            warn_of_learned(texts[name]["train"], {f"{own} are in {name} (train)": rows for own, rows in held})
        train = (line for name in self._trained for document in texts[name]["train"] for line in document)
        subwords = self._given or train_subwords((), train, self.tokenizer, (), self.cache)
        sizes: dict[str, list[TextSize]] = {}
        for split in SPLITS:
            streams, sizes[split] = [], []
            for documents in (splits[split] for splits in texts.values()):
                text = [" ".join(document) for document in documents]
                ids, bounds = encode(text, subwords, "target")
                stream = np.full(len(ids) + len(text) + 1, EOS_ID, np.int32)
                # document i comes after the i + 1 ends before it
                stream[np.arange(len(ids)) + 1 + np.repeat(np.arange(len(text)), np.diff(bounds))] = ids
                # What is encoded: sentencepiece writes a run of spaces as one, and one before the text.
                encoded = (line.replace("\u2581", " ") for line in subwords.processor("target").normalize(text))
                words, size = sum(map(num_words, text)), sum(len(t.removeprefix(" ").encode()) for t in encoded)
                sizes[split].append(TextSize(len(text), len(stream) - 1, words, size))
                streams.append(stream)
            writer.save(f"{split}_ids", np.concatenate(streams))
        writer.finish({**self.info_of(subwords), "sizes": sizes})

    def _check_options(self) -> None:
        check_at_least(1, block_size=self.block_size)
        if self.domains and self.own != TextCorpus():
            raise ValueError(
                "dataset, root, train_files and their like are of text without domains, which have own ones"
            )
        for corpus in self.corpora.values():
            corpus.check(is_read=not self.needs_no_dataset)
        if self.weights is None:
            return
        if self.weights.keys() != (self.domains or {}).keys():
            named = ", ".join(self.domains or ()) or "none"
            raise ValueError(f"weights are of {', '.join(self.weights)}, and the domains are {named}: one for each")
        check_at_least(0, **{f"weights.{name}": weight for name, weight in self.weights.items()})
        if not 0 < sum(self.weights.values()) < float("inf"):
            raise ValueError(f"weights={self.weights} are not finite, or all 0")


def prompt_batches(lines: Iterable[str], subwords: Subwords, start: int = 0) -> Iterator[tuple[TextBatch, list[str]]]:
    """Yield each prompt as a batch, with its line; ``index_B`` is its number, from 0, and those before ``start`` lack.

    A decoder that continues text has no place for padding, so each is by itself.
    """
    for number, line in itertools.islice(enumerate(lines), start, None):
        (row,) = subwords.encode([line], "target")
        yield TextBatch(torch.tensor([[EOS_ID, *row]]), torch.tensor([number])), [line]
