"""Subwords of a corpus: sentencepiece models as plain values, so that they travel in a checkpoint."""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import json
import logging
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import core
from apps.base.files import replacing
from apps.base.messages import one_line
from apps.base.progress import bar
from apps.data.text_files import clean
from core.fields import Bounds, Checked, Count, Length

log = logging.getLogger(__name__)

PAD_ID, UNK_ID, BOS_ID, EOS_ID = 0, 1, 2, 3
"""Ids of padding, of characters without a subword, and of a sentence's begin and end, in every vocabulary here."""

Side = Literal["source", "target"]


@core.register_config
@dataclass(frozen=True)
class Subwords(Checked):
    """Sentencepiece models of both sides of a corpus. A checkpoint keeps them with the model that reads their ids.

    Attributes:
        models: base64 of the sentencepiece model files: one for both sides, or the source's and the target's.
        languages: languages with a tag, whose id is the id of the token ``<2xx>``, xx being the language's code. Empty
            where sentences have no tag.

    Raises:
        ValueError: not one model or two, or one that sentencepiece cannot read.
    """

    prefix = "subwords."

    models: Annotated[tuple[str, ...], Length(1, 2, "[]", "one for both sides, or one for each")]
    languages: tuple[str, ...] = ()

    @property
    def is_joint(self) -> bool:
        """True if both sides have the same ids."""
        return len(self.models) == 1

    @property
    def digest(self) -> str:
        """12 hex digits that tell one set of models from another."""
        return hashlib.sha256("\n".join((*self.models, *self.languages)).encode()).hexdigest()[:12]

    def processor(self, side: Side) -> Any:
        """Return the ``SentencePieceProcessor`` of a side."""
        return _processor(self.models[0 if side == "source" else -1])

    def size(self, side: Side) -> int:
        """Return V, the number of ids of a side's vocabulary, specials and tags included."""
        return int(self.processor(side).vocab_size())

    def encode(self, sentences: Sequence[str], side: Side) -> list[list[int]]:
        """Return the ids of each sentence, without tag, start and end."""
        return self.processor(side).encode(list(sentences), out_type=int)

    def decode(self, ids: Sequence[Sequence[int]], side: Side) -> list[str]:
        """Return a line of text for each row of ids; specials and tags add none.

        A model that spells bytes may write line ends or control characters of a terminal: ``clean`` removes them.
        """
        return [clean(text) for text in self.processor(side).decode([[int(i) for i in row] for row in ids])]

    def pieces(self, ids: Sequence[int], side: Side) -> list[str]:
        """Return the subwords themselves, in sentencepiece's spelling."""
        processor = self.processor(side)
        return [processor.id_to_piece(int(i)) for i in ids]

    def surfaces(self, side: Side) -> list[bytes | None]:
        """Return what each id writes within a text, in UTF-8; None: nothing, as specials, tags and ``UNK_ID``."""
        return _surfaces(self.models[0 if side == "source" else -1])

    def tag_id(self, language: str) -> int:
        """Return the source side's id of the tag that asks for a translation into ``language``.

        Raises:
            ValueError: it has no tag.
        """
        if language not in self.languages:
            raise ValueError(f"language {language!r} has no tag: there is {', '.join(self.languages) or 'none'}")
        return int(self.processor("source").piece_to_id(f"<2{language}>"))


@functools.lru_cache(maxsize=8)
def _processor(model: str) -> Any:
    # Not kept in the dataclass: it stays plain values, and pickles.
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(base64.b64decode(model, validate=True))
    except Exception as error:
        raise ValueError("subwords: not a sentencepiece model") from error
    specials = (processor.pad_id(), processor.unk_id(), processor.bos_id(), processor.eos_id())
    if specials != (PAD_ID, UNK_ID, BOS_ID, EOS_ID):
        raise ValueError(f"subwords: ids of pad, unk, bos, eos are {specials}, not {(PAD_ID, UNK_ID, BOS_ID, EOS_ID)}")
    return processor


@functools.lru_cache(maxsize=8)
def _surfaces(model: str) -> list[bytes | None]:
    processor = _processor(model)
    return [
        bytes((int(piece[3:-1], 16),)) if processor.is_byte(i)
        else None if processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i)
        else piece.replace("\u2581", " ").encode()
        for i, piece in enumerate(map(processor.id_to_piece, range(processor.vocab_size())))
    ]  # fmt: skip


_THREADS = 8
"""Fixed, whatever the machine has: sentencepiece adds up its counts thread by thread, and rounds by their number."""
_LONGEST_BYTES = 1 << 14


@dataclass(frozen=True)
class SubwordConfig(Checked):
    """The way in which subwords are learned from the training text, or the place where they are.

    Attributes:
        kind: "bpe" (Sennrich et al. 2016) or "unigram" (Kudo 2018).
        vocab_size: ids of a vocabulary, which serves both sides if it is joint. The 4 specials, the tags, 256 bytes
            and the characters are among them. It is a limit: a small corpus may not have so many subwords.
        joint: one vocabulary for both sides; else each has its own.
        character_coverage: share of the text whose characters are subwords themselves; the rarest ones are spelled in
            bytes, as are characters that the training text lacks.
        max_sentences: sentences of a side from which subwords are learned; from a larger corpus so many are sampled.
        symbols: texts that are subwords of their own wherever they stand; "▁" is a space. With it a word has the same
            subwords after a space, a quote or a bracket, as a model that copies needs.
        path: folder of a published checkpoint, or a sentencepiece model of yours, from which subwords are read instead.
            The other options have no effect then.

    Raises:
        ValueError: a value out of its range.
    """

    kind: Literal["bpe", "unigram"] = "bpe"
    vocab_size: Count = 8000
    joint: bool = True
    character_coverage: Annotated[float, Bounds(0.9, 1, "[]")] = 0.9999
    max_sentences: Count = 2_000_000
    symbols: tuple[str, ...] = ()
    path: str | None = None


def train_subwords(
    source: Iterable[str], target: Iterable[str], config: SubwordConfig, languages: Sequence[str] = (),
    cache: Path | None = None,
) -> Subwords:  # fmt: skip
    """Learn the subwords of a corpus. Equal text and equal options always give equal subwords.

    Args:
        source: the sentences of the source side, from the training split only. One that comes twice counts once.
        target: the sentences of the target side.
        config: options of the learning.
        languages: languages that need a tag.
        cache: folder for the models, so that the same one is not trained again; None: none is kept.

    Raises:
        ValueError: no text, or a vocabulary too small for its characters.
    """
    if config.joint:
        models = [_model([*source, *target], config, languages, cache)]
    else:
        models = [_model(source, config, languages, cache), _model(target, config, (), cache)]
    return Subwords(tuple(base64.b64encode(model).decode() for model in models), tuple(languages))


def _model(lines: Iterable[str], config: SubwordConfig, languages: Sequence[str], cache: Path | None) -> bytes:
    import numpy as np
    import sentencepiece

    sentences = list(dict.fromkeys(part for line in lines if line for part in _parts(line)))
    if len(sentences) > config.max_sentences:
        chosen = np.random.RandomState(0).permutation(len(sentences))[: config.max_sentences]
        sentences = [sentences[i] for i in np.sort(chosen)]
    if cache is None:
        return _train(sentences, config, languages)
    how = {name: value for name, value in asdict(config).items() if name != "path"}
    options = json.dumps([how, list(languages), sentencepiece.__version__, _THREADS])
    digest = hashlib.sha256(options.encode())
    for sentence in sentences:
        digest.update(sentence.encode() + b"\n")
    path = cache / "subwords" / f"{config.kind}-{config.vocab_size}-{digest.hexdigest()[:16]}.model"
    if path.is_file():
        return path.read_bytes()
    with bar(f"learning subwords from {len(sentences):,} sentences"):  # the library does not say how far it is
        model = _train(sentences, config, languages)
    with replacing(path, "wb") as file:
        file.write(model)
    return model


def _parts(line: str) -> Iterator[str]:
    """Cut a line at spaces, or else between characters, into parts that sentencepiece does not skip as too long."""
    data, start = line.encode(), 0
    while len(data) - start > _LONGEST_BYTES:
        end = data.rfind(b" ", start + 1, start + _LONGEST_BYTES + 1)
        if end < 0:
            end = start + _LONGEST_BYTES
            while data[end] & 0xC0 == 0x80:  # within a character
                end -= 1
        yield data[start:end].decode()
        start = end
    yield data[start:].decode()


def _check_threads() -> None:
    """Raise a ``RuntimeError`` if the machine gives too few threads, in which case sentencepiece aborts the process."""
    done, started = threading.Event(), list[threading.Thread]()
    try:
        for _ in range(_THREADS):
            thread = threading.Thread(target=done.wait)
            thread.start()
            started.append(thread)
    except RuntimeError as error:
        why = "is there a limit on addresses (ulimit -v) or processes (ulimit -u)?"
        raise RuntimeError(f"subwords are learned by {_THREADS} threads: {error}; {why}") from error
    finally:
        done.set()
        for thread in started:
            thread.join()


def _train(sentences: list[str], config: SubwordConfig, languages: Sequence[str]) -> bytes:
    from sentencepiece import SentencePieceTrainer

    if not sentences:
        raise ValueError("there is no text to learn subwords from")
    _check_threads()
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type=config.kind,
            vocab_size=config.vocab_size,
            hard_vocab_limit=False,
            character_coverage=config.character_coverage,
            byte_fallback=True,
            # What goes in comes out: references are compared with their own characters, not with compatible ones.
            normalization_rule_name="identity",
            pad_id=PAD_ID,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            unk_surface="",
            # Control symbols, not user-defined ones: a "<2de>" in a text stays text, and a tag is not part of one.
            control_symbols=[f"<2{language}>" for language in languages],
            user_defined_symbols=list(config.symbols),
            max_sentence_length=_LONGEST_BYTES,
            num_threads=_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        if needed := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
            raise ValueError(
                f"vocab_size={config.vocab_size} is too small: specials, tags, bytes and characters are {needed[1]}"
            ) from error
        raise ValueError(f"subwords cannot be learned: {one_line(str(error))}") from error
    return model.getvalue()
