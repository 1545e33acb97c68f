"""A read-out that copies: the mixture by plain loops, step by step as whole, and in every search."""

import math
from types import SimpleNamespace

import naive_search as naive
import pytest
import torch

import core
from apps.data.subwords import BOS_ID, EOS_ID, PAD_ID
from apps.nets.config import TransformerConfig
from apps.nets.copying import CopyGate
from apps.nets.decode_cache import Memory
from apps.nets.loss import LogProbs, OutputLogits, linear_cross_entropy, target_scores
from apps.nets.transformer import TranslationModel
from apps.nlp.decode import DecodeConfig, translate_ids

CONFIG = TransformerConfig("nano", dim=16, hidden_dim=16, encoder_layers=2, decoder_layers=2, dropout=0.0)
MOE = core.MoEConfig(4, core.TokenChoice(top_k=2), core.FFN(hidden_dim=8))
SOURCE = torch.tensor([[7, 9, 7, EOS_ID, PAD_ID], [5, EOS_ID, PAD_ID, PAD_ID, PAD_ID], [8, 6, 9, 10, EOS_ID]])
TARGET = torch.tensor([[BOS_ID, 7, 9], [BOS_ID, 5, PAD_ID], [BOS_ID, 10, 6]])


@pytest.fixture
def model() -> TranslationModel:
    torch.manual_seed(0)
    model = TranslationModel(CONFIG, source_vocab=12, ffn=MOE, copies=True).double().eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return model


def test_the_mixture_by_hand_has_words_that_the_vocabulary_excludes():
    # The vocabulary says (1/2, 1/4, 1/4); the source is (2, 0, 2) with attention (.5, .2, .3), and g = 0.6.
    logits, ids = torch.tensor([[math.log(2), 0.0, 0.0]]), torch.tensor([[2, 0, 2]])
    log_p = CopyGate.mix(logits, torch.tensor([[0.5, 0.2, 0.3]]), torch.tensor([[0.6]]), ids)
    assert log_p.exp()[0].tolist() == pytest.approx([0.3 + 0.08, 0.15, 0.15 + 0.4 * 0.8])
    torch.manual_seed(0)
    gate = CopyGate(4)
    torch.nn.init.constant_(gate.gate.bias, -50.0)  # g = 0: only copies
    source = Memory(torch.randn(1, 3, 4), torch.tensor([[True, True, False]]), ids_BS=torch.tensor([[5, 6, 0]]))
    weight, g = gate(torch.randn(1, 2, 4), source)
    logits = torch.zeros(1, 2, 8).index_fill(2, torch.tensor([5, 6]), -math.inf)
    p = gate.mix(logits, weight, g, torch.tensor([[[5, 6, 0]]]).expand(-1, 2, -1)).exp()
    assert p[..., [5, 6]].sum(-1).tolist() == [pytest.approx([1.0, 1.0], abs=1e-6)]


def test_log_probabilities_are_those_of_plain_loops_over_the_places_of_the_source(model):
    gate, memory = model.copy_gate, model.encode(SOURCE)
    h_BLD, log_p_BLV = model.decode(TARGET, memory), model(SOURCE, TARGET)
    for b in range(3):
        for at in range(3 if TARGET[b, -1] else 2):
            h = h_BLD[b, at]
            places = [s for s in range(5) if SOURCE[b, s] != PAD_ID]
            scores = [(memory.x_BSD[b, s] @ gate.query.weight @ h).item() / 16**0.5 for s in places]
            total = sum(map(math.exp, scores))
            attention = [math.exp(score) / total for score in scores]
            seen = sum(a * memory.x_BSD[b, s] for a, s in zip(attention, places, strict=True))
            g = (gate.gate.weight[0] @ torch.cat((h, seen)) + gate.gate.bias).sigmoid().item()
            p = [g * one for one in model.logits(h).softmax(-1).tolist()]
            for a, s in zip(attention, places, strict=True):
                p[int(SOURCE[b, s])] += (1 - g) * a
            assert log_p_BLV[b, at].exp().tolist() == pytest.approx(p, abs=1e-9)
            assert sum(p) == pytest.approx(1)


def test_a_pass_is_the_same_step_by_step_also_where_copies_of_a_sentence_leave(model):
    whole = model(SOURCE, TARGET)
    cache = model.start(model.encode(SOURCE)).expand(2)
    first = model.step(TARGET[:, 0].repeat_interleave(2), cache)
    torch.testing.assert_close(first, whole[:, 0].repeat_interleave(2, 0))
    cache = cache.select(torch.tensor([5, 4, 0, 0]))  # the last sentence and the first stay
    second = model.step(TARGET[[2, 2, 0, 0], 1], cache)
    torch.testing.assert_close(second, whole[[2, 2, 0, 0], 1])


@pytest.mark.parametrize("method", ["greedy", "beam", "sample"])
def test_searches_are_those_of_plain_loops(model, method):
    config = DecodeConfig(method, max_length_ratio=1.0, max_length_extra=3, num_beams=3, num_return_sequences=1)
    slow = SimpleNamespace(
        encode=model.encode,
        decode=lambda ids, memory: model.next_logits(model.decode(ids, memory), memory),
        logits=lambda log_p: log_p,
        modules=model.modules,
        config=model.config,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(naive, "dropless", lambda model: torch.no_grad())
        expected = naive.translate_ids(slow, SOURCE, config, index_B=torch.arange(3))
    found = translate_ids(model, SOURCE, config)
    assert found.ids == expected.ids
    assert [s for (s,) in found.scores] == pytest.approx([s for (s,) in expected.scores])


def test_log_probabilities_have_the_loss_and_the_scores_of_logits():
    generator = torch.Generator().manual_seed(0)
    h, weight = torch.randn(5, 4, generator=generator), torch.randn(7, 4, generator=generator)
    target, known = torch.tensor([0, 3, 6, 2, 2]), LogProbs((h @ weight.T).log_softmax(-1))
    for smoothing in (0.0, 0.1):
        expected = linear_cross_entropy(h, weight, target, smoothing)
        torch.testing.assert_close(known.cross_entropy(target, smoothing), expected)
    expected = target_scores(h, weight, target)
    torch.testing.assert_close(known.scores(target).nll_T, expected.nll_T)
    assert known.scores(target).is_first_T.tolist() == expected.is_first_T.tolist()
    assert LogProbs(known.log_p_TV[:0]).cross_entropy(target[:0], 0.1) == 0
    logits, other = OutputLogits(h, weight), OutputLogits(h.flip(0), weight)
    others = LogProbs((other.h_TD @ weight.T).log_softmax(-1))
    torch.testing.assert_close(known.divergence(others, 2.0), logits.divergence(other, 2.0))
    for own, teacher in ((known, logits), (logits, known)):
        with pytest.raises(ValueError, match="both need the same copy"):
            own.divergence(teacher, 1.0)


def test_shares_add_up_to_1_in_half_precision_and_need_one_vocabulary(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_p = model.float()(SOURCE, TARGET)
    assert log_p.dtype == torch.float32
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(3, 3), atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match=r"copy=True .* data.tokenizer.joint=true"):
        TranslationModel(CONFIG, source_vocab=12, target_vocab=9, copies=True)
