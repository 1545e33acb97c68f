"""The parallel texts that are known by name, and how those of yours are found.

Importing this reads no file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from apps import sources
from apps.nlp.readers import moses
from apps.nlp.readers.lines import Rows
from apps.sources import Dataset, File, UrlSource

Read = Callable[[], Mapping[str, Sequence[Rows]]]


@dataclass(frozen=True)
class Corpus:
    """A corpus: one that is known by name, or files of yours.

    Attributes:
        dataset: a name of ``moesaic data list``, or what your files are: "moses".
        root: folder with the dataset's own files; of yours, the folder their names start from.
        train_files: of yours. Moses: ``train`` for ``train.en`` and ``train.de``, plain or ``.gz``; or with the place
            of the language and, if each pair has its own files, of the pair: ``{pair}/train.{lang}``.
        val_files, test_files: likewise. None: rows of train_files are held out. Of multi30k: other names than ``val``
            and ``test_2016_flickr``.
        val_size, test_size: rows to hold out where there is no file of them, or a share of all below 1; None: 1000, and
            no more than a twentieth of a small corpus.
    """

    dataset: str
    root: str | None = None
    train_files: str | None = None
    val_files: str | None = None
    test_files: str | None = None
    val_size: int | float | None = None
    test_size: int | float | None = None


@dataclass(frozen=True)
class NlpDataset:
    """A parallel text that is known by name.

    Attributes:
        source: its files, and where they come from.
        languages: those it has.
        pairs: the language pairs that are meant where none are named.
        find: of a folder with those files, the language pairs, and the corpus' options: the files, and what reads them.
    """

    source: Dataset
    languages: tuple[str, ...]
    pairs: tuple[str, ...]
    find: Callable[[Path, Sequence[str], Corpus], tuple[list[Path], Read]]


def find_moses(root: Path, pairs: Sequence[str], corpus: Corpus) -> tuple[list[Path], Read]:
    """The files of text in Moses form, and what reads them by split."""
    named = {"train": corpus.train_files, "val": corpus.val_files, "test": corpus.test_files}
    found = {split: moses.find(root, name, pairs) for split, name in named.items() if name is not None}
    files = [path for texts in found.values() for text in texts for path in text.values()]
    return files, lambda: {split: [moses.read(text) for text in texts] for split, texts in found.items()}


_MULTI30K = "https://raw.githubusercontent.com/multi30k/dataset/a3d2e0d26b56f3846f66a952536ffed4e401d05a/"
_RAW = "data/task1/raw"


def _find_multi30k(root: Path, pairs: Sequence[str], corpus: Corpus) -> tuple[list[Path], Read]:
    folder = root / _RAW if (root / _RAW).is_dir() else root
    names = (corpus.val_files or "val", corpus.test_files or "test_2016_flickr")
    return find_moses(folder, pairs, Corpus("moses", None, "train", *names))


_MULTI30K_HASHES = {
    "test_2016_flickr.cs": "200a4a74cc9560f051924abb9803be008d1908d77f747e9141aeb86dfd2797f1",
    "test_2016_flickr.de": "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8",
    "test_2016_flickr.en": "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9",
    "test_2016_flickr.fr": "6d326e188d259fb1d04ac19eae3af956559b3a0b93d7635e56c90987c40c8b90",
    "test_2017_flickr.de": "a2c89666db00c495cd8513b9d708d5a3acc205d7de312ef2bf5fb7ebc1540aee",
    "test_2017_flickr.en": "76a444ee25172e72695cddb13ae4a3bda59430617be88e0bb46b60504f054074",
    "test_2017_flickr.fr": "3ba671ceb2299f3304ffafefea7a833d08632fbaf0ba18546f8a2ec2391af496",
    "train.cs": "a65adb8b32e3bc664f21ecba7a6e7f6950fd1f405e135f7c312faabdb6255077",
    "train.de": "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6",
    "train.en": "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f",
    "train.fr": "622e75069e9f4c577425c4f277116ce66e63a2401c0a2312d90073cb12379a3c",
    "val.cs": "b63226e05c4bd5dd6a42897d74b86a1b9d2c31498252c572b1ea7f7996927fcc",
    "val.de": "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a",
    "val.en": "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28",
    "val.fr": "ca3106f1a72390591d25f6c45cb4cd39dec4cd3f123e099748a3ce5256c160e9",
}

# Standard parallel texts, by name.
NLP_DATASETS: dict[str, NlpDataset] = {
    dataset.source.name: dataset
    for dataset in (
        NlpDataset(
            Dataset(
                name="multi30k",
                app="nlp",
                title="Multi30k, captions in en, de, fr, cs, 29,000 train, 1,014 val, 1,000 test (2016 and 2017)",
                layouts=tuple(
                    tuple(f"{folder}{split}.*" for split in ("train", "val", "test_2016_flickr"))
                    for folder in (f"{_RAW}/", "")
                ),
                sources=(
                    UrlSource(
                        _MULTI30K, tuple(File(f"{_RAW}/{name}.gz", sha) for name, sha in _MULTI30K_HASHES.items())
                    ),
                ),
                licence="none stated; captions of Flickr30k: research use; cite Elliott et al. 2016, 2017",
                note="cs has no test_2017_flickr.",
            ),
            ("en", "de", "fr", "cs"),
            ("en-de",),
            _find_multi30k,
        ),
    )
}

for _dataset in NLP_DATASETS.values():
    sources.register(_dataset.source)

# What reads files of yours, by ``dataset``.
OWN: dict[str, Callable[[Path, Sequence[str], Corpus], tuple[list[Path], Read]]] = {"moses": find_moses}


def find_corpus(corpus: Corpus, pairs: Sequence[str], cache_dir: str | None) -> tuple[list[Path], Read]:
    """The files of a corpus, fetched if need be, and what reads them by split.

    Raises:
        ValueError: a missing file.
        DataError: no source could deliver.
    """
    if corpus.dataset in OWN:
        return OWN[corpus.dataset](Path(corpus.root or ".").expanduser(), pairs, corpus)
    known = NLP_DATASETS[corpus.dataset]
    return known.find(sources.prepare(corpus.dataset, corpus.root, cache_dir), pairs, corpus)
