"""Sentencepiece models of published checkpoints have our ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from apps.porting import (
    FAMILIES,
    subwords_of,
)


def sentencepiece_file(path: Path, **options: Any) -> Any:
    """A sentencepiece model of a few words, written to ``path``, and its processor."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    words = ["a dog runs", "a cat sleeps", "the dog sleeps", "the cat runs fast", "dogs and cats"]
    with path.open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(words * 4),
            model_writer=file,
            vocab_size=40,
            hard_vocab_limit=False,
            minloglevel=2,
            **options,
        )
    return SentencePieceProcessor(model_file=str(path))


@pytest.mark.parametrize("kind", ["t5", "mistral"])
def test_subwords_have_our_ids(kind, tmp_path):
    layouts = {
        "t5": ("spiece.model", {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "model_type": "unigram"}),
        "mistral": ("tokenizer.model", {"unk_id": 0, "bos_id": 1, "eos_id": 2, "model_type": "bpe"}),
    }
    name, options = layouts[kind]
    theirs = sentencepiece_file(tmp_path / name, **options)
    size = theirs.vocab_size() + 5  # as T5's, with ids that are no subwords
    config = {"model_type": kind, "vocab_size": size, "pad_token_id": 0, "eos_token_id": 1}
    if kind == "mistral":
        config = {"model_type": kind, "vocab_size": size, "bos_token_id": 1, "eos_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    subwords = subwords_of(tmp_path)
    assert subwords.size("source") == size + 1  # T5 has no begin, Mistral no padding
    vocabulary = FAMILIES[kind].vocabulary(config)[0]
    sentences = ["the dog runs", "cats sleep", ""]
    ids = [vocabulary.ours[torch.tensor(row, dtype=torch.int64)].tolist() for row in theirs.encode(sentences)]
    assert subwords.encode(sentences, "source") == ids
    assert subwords.decode(ids, "target") == sentences
    assert subwords.pieces([0, 1, 2, 3], "source") == ["<pad>", "<unk>", "<s>", "</s>"]


def test_subwords_of_another_kind(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "vocab_size": 9}))
    with pytest.raises(ValueError, match=r"has no subwords that are known here: neither spiece.model nor tokenizer"):
        subwords_of(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"spiece.model is no sentencepiece model$"):
        subwords_of(tmp_path)
