"""Ids of a published vocabulary in the order of ours."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from published_models import NLLB, VOCAB
from published_shapes import MIXTRAL

from apps.data.subwords import BOS_ID, EOS_ID
from apps.nets.transformer import LanguageModel, TranslationModel
from apps.porting import (
    Vocabulary,
)


def test_specials_come_first_and_the_others_keep_their_order():
    # fairseq: begin 0, padding 1, end 2, unknown 3.
    vocabulary = Vocabulary(6, pad=1, unk=3, bos=0, eos=2, spare=1)
    assert vocabulary.theirs.tolist() == [1, 3, 0, 2, 4, 5]
    assert vocabulary.ours.tolist() == [2, 0, 3, 1, 4, 5]
    assert vocabulary.our_size == 6


def test_a_special_that_they_lack_is_a_row_more():
    # T5: padding 0, end 1, unknown 2, and no begin: a copy of padding, with which their decoder starts. The way back
    # takes that copy, which is what was read.
    vocabulary = Vocabulary(5, pad=0, unk=2, bos=None, eos=1, spare=0)
    assert vocabulary.theirs.tolist() == [0, 2, 0, 1, 3, 4]
    assert vocabulary.ours.tolist() == [2, 3, 1, 4, 5]
    assert vocabulary.resized(9) == Vocabulary(8, pad=0, unk=2, bos=None, eos=1, spare=0)


def test_ids_that_cannot_be():
    with pytest.raises(ValueError, match=r"^the id 5 of eos is not in a vocabulary of vocab_size=5$"):
        Vocabulary(5, pad=0, unk=2, bos=None, eos=5, spare=0)
    with pytest.raises(ValueError, match=r"one stands for two$"):
        Vocabulary(5, pad=0, unk=2, bos=0, eos=1, spare=0)


def test_a_decoder_may_start_from_the_end():
    # With start="eos" the decoder reads BOS_ID as EOS_ID, in a whole sequence and step by step, and says other logits
    # for the two all the same.
    model = TranslationModel(replace(NLLB, start="eos"), source_vocab=VOCAB).eval()
    source_BS, target_BL = torch.randint(4, VOCAB, (2, 5)), torch.randint(4, VOCAB, (2, 4))
    target_BL[:, 0] = BOS_ID
    ended_BL = target_BL.clone()
    ended_BL[:, 0] = EOS_ID
    logits_BLV = model(source_BS, target_BL)
    assert torch.equal(logits_BLV, model(source_BS, ended_BL))
    assert not torch.allclose(logits_BLV[..., BOS_ID], logits_BLV[..., EOS_ID])
    cache = model.start(model.encode(source_BS))
    for t in range(4):
        torch.testing.assert_close(model.step(target_BL[:, t], cache), logits_BLV[:, t])
    text = LanguageModel(replace(MIXTRAL, start="eos"), vocab=VOCAB).eval()
    assert torch.equal(text(target_BL), text(ended_BL))
