"""The sentencepiece model of a published checkpoint, or your own, its tokens in the order of our ids; and back."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apps.base.files import replacing
from apps.base.messages import first_line
from apps.data.subwords import BOS_ID, EOS_ID, PAD_ID, UNK_ID, Subwords
from apps.porting.vocabulary import Vocabulary

FILES = ("spiece.model", "tokenizer.model")
"""The files of T5's and Mistral's families, in which a piece's place is its id."""
FILE_OF = {"t5": FILES[0], "mt5": FILES[0], "switch_transformers": FILES[0], "mistral": FILES[1], "mixtral": FILES[1]}
SPECIALS = {PAD_ID: "<pad>", UNK_ID: "<unk>", BOS_ID: "<s>", EOS_ID: "</s>"}
_TAG = re.compile(r"<2([^<>\s]+)>")
_UNUSED = "<unused {}>"


def read_subwords(folder: Path, vocabulary: Vocabulary, targets: Sequence[str] = ()) -> Subwords:
    """Return the subwords in ``folder``.

    Ids past its tokens, such as T5's sentinels, are never said; tags take the last ones.

    Raises:
        ValueError: the file does not exist, or it cannot be read; fewer ids than tags are left.
    """
    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"{folder} has no subwords that are known here: neither {' nor '.join(FILES)}")
    proto = _in_our_order(_read(path), vocabulary)
    languages, lacking = _tags(proto, targets)
    free = [piece for piece in proto.pieces if _is_free(piece)]
    if len(free) < len(lacking):
        raise ValueError(
            f"{path} has no tag for {', '.join(lacking)}, and {len(free)} ids that are not used: take pairs of one "
            "target language"
        )
    for language in lacking:
        _make_tag(free.pop(), language)
    return _subwords(proto, (*languages, *lacking))


def read_file(path: Path, targets: Sequence[str] = ()) -> Subwords:
    """Return the subwords of a sentencepiece model, whatever its special ids. Tags that it lacks are added at its end.

    Raises:
        ValueError: it cannot be read.
    """
    from sentencepiece import SentencePieceProcessor

    theirs, processor = _read(path), SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(theirs.SerializeToString())
    except RuntimeError as error:
        raise ValueError(f"{path} is no sentencepiece model") from error
    ids = (processor.pad_id(), processor.unk_id(), processor.bos_id(), processor.eos_id())
    pad, unk, bos, eos = (None if i < 0 else i for i in ids)
    proto = _in_our_order(theirs, Vocabulary(len(theirs.pieces), pad, unk, bos, eos, spare=0))
    languages, lacking = _tags(proto, targets)
    for language in lacking:
        _make_tag(proto.pieces.add(), language)
    return _subwords(proto, (*languages, *lacking))


def write_subwords(subwords: Subwords, folder: Path, model_type: str, vocabulary: Vocabulary) -> None:
    """Write the sentencepiece model as the published family names it, its tokens in the order of their ids.

    Raises:
        ValueError: the family's tokenizer has another kind, or the subwords differ from the vocabulary's.
    """
    if model_type not in FILE_OF:
        raise ValueError(f"subwords cannot be said in {model_type}, whose tokenizer is no sentencepiece model alone")
    if not subwords.is_joint or subwords.size("source") != vocabulary.our_size:
        kind = "joint" if subwords.is_joint else "separate"
        raise ValueError(
            f"{kind} subwords of {subwords.size('source')} ids are not those of a model with a joint vocabulary of "
            f"{vocabulary.our_size}"
        )
    ours = _parsed(base64.b64decode(subwords.models[0]))
    copies = [i for i, their_id in enumerate(vocabulary.specials) if their_id is None]
    place = {their_id: i for i, their_id in enumerate(vocabulary.theirs.tolist()) if i not in copies}
    proto = type(ours)()
    proto.CopyFrom(ours)
    del proto.pieces[:]
    for their_id in range(vocabulary.size):
        proto.pieces.add().CopyFrom(ours.pieces[place[their_id]])
    while _is_free(proto.pieces[-1]):
        del proto.pieces[-1]
    _describe(proto, [-1 if i is None else i for i in vocabulary.specials])
    with replacing(folder / FILE_OF[model_type], "wb") as file:
        file.write(proto.SerializeToString())


def _read(path: Path) -> Any:
    try:
        return _parsed(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from error
    except Exception as error:  # protobuf's own, which is of no public class
        raise ValueError(f"{path} is no sentencepiece model") from error


def _parsed(data: bytes) -> Any:
    # Its messages need protobuf, which tensorboard brings.
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    proto = ModelProto()
    proto.ParseFromString(data)
    return proto


def _in_our_order(theirs: Any, vocabulary: Vocabulary) -> Any:
    kinds = theirs.SentencePiece
    ours = type(theirs)()
    ours.CopyFrom(theirs)
    del ours.pieces[:]
    for i, their_id in enumerate(vocabulary.theirs.tolist()):
        if i in SPECIALS:
            ours.pieces.add(piece=SPECIALS[i], score=0.0, type=kinds.UNKNOWN if i == UNK_ID else kinds.CONTROL)
        elif their_id < len(theirs.pieces) and theirs.pieces[their_id].piece not in SPECIALS.values():
            ours.pieces.add().CopyFrom(theirs.pieces[their_id])
        else:
            ours.pieces.add(piece=_UNUSED.format(their_id), score=0.0, type=kinds.UNUSED)
    _describe(ours, sorted(SPECIALS))
    ours.trainer_spec.unk_surface = ""
    return ours


def _describe(proto: Any, ids: Sequence[int]) -> None:
    """Write where padding, unknown, start and end are, and how many tokens there are."""
    spec = proto.trainer_spec
    spec.pad_id, spec.unk_id, spec.bos_id, spec.eos_id = ids
    spec.pad_piece, spec.unk_piece, spec.bos_piece, spec.eos_piece = (SPECIALS[i] for i in sorted(SPECIALS))
    spec.vocab_size = len(proto.pieces)


def _tags(proto: Any, targets: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the languages that have a tag, and those that need a new one; text without a target needs none."""
    kinds = proto.SentencePiece
    tagged = []
    for piece in proto.pieces if targets else ():
        if piece.type in (kinds.CONTROL, kinds.USER_DEFINED) and (tag := _TAG.fullmatch(piece.piece)):
            piece.type = kinds.CONTROL  # a "<2de>" in a text stays text
            tagged.append(tag[1])
    needed = len(targets) > 1 or tagged
    return tagged, [language for language in targets if language not in tagged] if needed else []


def _make_tag(piece: Any, language: str) -> None:
    piece.piece, piece.score, piece.type = f"<2{language}>", 0.0, piece.CONTROL


def _is_free(piece: Any) -> bool:
    return piece.type == piece.UNUSED and piece.piece.startswith(_UNUSED.partition("{")[0])


def _subwords(proto: Any, languages: Sequence[str]) -> Subwords:
    subwords = Subwords((base64.b64encode(proto.SerializeToString()).decode(),), tuple(languages))
    subwords.size("source")  # raises for a file that is not a model
    return subwords
