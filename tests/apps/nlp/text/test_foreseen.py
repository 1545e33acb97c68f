"""The ids that a decoder reads, and nats a token, by hand."""

import torch
from torch.testing import assert_close

from apps.data.subwords import BOS_ID, EOS_ID, PAD_ID
from apps.nlp.text.foreseen import read_ids
from apps.train.step.pieces import ratio_values


def test_the_decoder_reads_all_but_the_end():
    target = torch.tensor([[BOS_ID, 7, 8, EOS_ID], [BOS_ID, 9, EOS_ID, PAD_ID]])
    # To be said: 7 8 EOS, 9 EOS. After an EOS there is nothing to say, so it is not read.
    assert read_ids(target).tolist() == [[BOS_ID, 7, 8], [BOS_ID, 9, PAD_ID]]


def test_the_mean_of_a_ratio_s_values_is_the_ratio():
    # 6 nats of 3 tokens: 2. The rows are 1 - 2 and 5 - 4 nats off, over 3 / 2 tokens a row.
    values = ratio_values(torch.tensor([1.0, 5.0]), torch.tensor([1.0, 2.0]))
    assert_close(values, torch.tensor([2 - 1 / 1.5, 2 + 1 / 1.5]))
