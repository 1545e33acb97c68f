"""Options of a search beside transformers' logits processors of the same names."""

from __future__ import annotations

import naive_search as naive
import pytest
import torch
from toy_decoders import Recurrent, sources

from apps.data.subwords import PAD_ID
from apps.nlp.decode import DecodeConfig, generate_ids
from apps.nlp.decode.sampling import sampling_probs

processors = pytest.importorskip("transformers.generation.logits_process")


@pytest.mark.parametrize("min_p", [0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.3, 12, 0.8)])
def test_min_p_is_transformers(min_p, temperature, top_k, top_p):
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(50, 40, generator=g, dtype=torch.float64)
    config = DecodeConfig("sample", min_p=min_p, temperature=temperature, top_k=top_k, top_p=top_p)
    expected = processors.TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = processors.TopKLogitsWarper(top_k)(None, expected)
        expected = processors.TopPLogitsWarper(top_p)(None, expected)
    expected = processors.MinPLogitsWarper(min_p)(None, expected)
    torch.testing.assert_close(sampling_probs(logits, config), expected.softmax(-1))


@pytest.mark.parametrize("method", ["greedy", "beam", "sample"])
@pytest.mark.parametrize("penalty", [1.3, 2.5])
def test_a_repetition_penalty_is_transformers_in_each_method(method, penalty):
    """The plain loops with transformers' processor before the softmax, also for each beam."""
    model, prompts = Recurrent(seed=1), sources([5, 2, 7], seed=1)
    processor = processors.RepetitionPenaltyLogitsProcessor(penalty)

    def next_log_probs(ids):
        ids_1L = torch.tensor([ids])
        return processor(ids_1L, model(ids_1L)[:, -1].clone())[0].log_softmax(-1).tolist()

    config = DecodeConfig(method, num_beams=4, repetition_penalty=penalty, max_new_tokens=9)
    out = generate_ids(model, prompts, config)
    for b, row in enumerate(prompts):
        prompt = row[row != PAD_ID].tolist()
        with torch.no_grad():
            (ids, score), *_ = naive._best(next_log_probs, prompt, len(prompt), config, model, b)
        assert out.best[b] == ids
        assert out.scores[b][0] == pytest.approx(score)
