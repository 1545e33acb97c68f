"""The sentencepiece model of a published checkpoint, its pieces in the order of our ids."""

from __future__ import annotations

import base64
from pathlib import Path

from apps.nlp.subwords import BOS_ID, EOS_ID, PAD_ID, UNK_ID, Subwords

from .vocabulary import Vocabulary

FILES = ("spiece.model", "tokenizer.model")
"""Those of T5's and Mistral's families, in which a piece's place is its id."""
SPECIALS = {PAD_ID: "<pad>", UNK_ID: "<unk>", BOS_ID: "<s>", EOS_ID: "</s>"}


def read_subwords(folder: Path, vocabulary: Vocabulary) -> Subwords:
    """The subwords in ``folder``. Ids past its pieces, such as T5's sentinels, are never said.

    Raises:
        ValueError: there is no such file, or it cannot be read.
    """
    # Its messages need protobuf, which tensorboard brings.
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"{folder} has no subwords that are known here: neither {' nor '.join(FILES)}")
    theirs = ModelProto()
    try:
        theirs.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's own, which is of no public class
        raise ValueError(f"{path} is no sentencepiece model") from error
    kinds = ModelProto.SentencePiece
    ours = ModelProto()
    ours.CopyFrom(theirs)
    del ours.pieces[:]
    for i, their_id in enumerate(vocabulary.theirs.tolist()):
        if i in SPECIALS:
            ours.pieces.add(piece=SPECIALS[i], score=0.0, type=kinds.UNKNOWN if i == UNK_ID else kinds.CONTROL)
        elif their_id < len(theirs.pieces) and theirs.pieces[their_id].piece not in SPECIALS.values():
            ours.pieces.add().CopyFrom(theirs.pieces[their_id])
        else:
            ours.pieces.add(piece=f"<unused {their_id}>", score=0.0, type=kinds.UNUSED)
    spec = ours.trainer_spec
    spec.pad_id, spec.unk_id, spec.bos_id, spec.eos_id = PAD_ID, UNK_ID, BOS_ID, EOS_ID
    spec.pad_piece, spec.unk_piece, spec.bos_piece, spec.eos_piece = (SPECIALS[i] for i in sorted(SPECIALS))
    spec.unk_surface, spec.vocab_size = "", len(ours.pieces)
    subwords = Subwords((base64.b64encode(ours.SerializeToString()).decode(),))
    subwords.size("source")  # a file that is no model is found here
    return subwords
