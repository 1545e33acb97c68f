"""The ids that a decoder reads, by hand."""

import torch

from apps.data.subwords import BOS_ID, EOS_ID, PAD_ID
from apps.nlp.foreseen import read_ids


def test_the_decoder_reads_all_but_the_end():
    target = torch.tensor([[BOS_ID, 7, 8, EOS_ID], [BOS_ID, 9, EOS_ID, PAD_ID]])
    # To be said: 7 8 EOS, 9 EOS. After an EOS there is nothing to say, so it is not read.
    assert read_ids(target).tolist() == [[BOS_ID, 7, 8], [BOS_ID, 9, PAD_ID]]
