"""Searches on tables worked out by hand, and against plain loops over sentences and hypotheses."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import naive_search as naive
import pytest
import torch
from torch import Tensor, nn
from toy_decoders import VOCAB, A, B, Recurrent, Table, close, sources

import core
from apps.base.messages import warn_once
from apps.data.subwords import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from apps.nets.config import TransformerConfig
from apps.nets.transformer import LanguageModel, TranslationModel
from apps.nlp.decode import DecodeConfig, generate_ids, in_dtype, translate_ids
from apps.nlp.decode.sampling import generator, sampling_probs
from apps.nlp.decode.top import top_sums

# after BOS: a .5, b .4, end .1; after a: a .4, b .3, end .3; after b: a .1, end .9
PROBS = {BOS_ID: {A: 0.5, B: 0.4, EOS_ID: 0.1}, A: {A: 0.4, B: 0.3, EOS_ID: 0.3}, B: {A: 0.1, EOS_ID: 0.9}}
AT_MOST_2 = {"max_length_ratio": 0.0, "max_length_extra": 2}


def decoded(model: Table, num_sentences: int = 1, **options: Any) -> tuple[list[list[int]], list[float]]:
    """Ids and scores of the first of some equal sentences; all must be the same."""
    config = DecodeConfig(**{**AT_MOST_2, **options})
    out = translate_ids(model, torch.full((num_sentences, 3), EOS_ID), config)
    assert all(ids == out.ids[0] for ids in out.ids)
    return out.ids[0], out.scores[0]


def test_greedy_takes_the_best_id_each_step_up_to_its_maximal_length_and_ends_not_before_its_minimal():
    ids, scores = decoded(Table(PROBS), method="greedy", length_penalty=0.0)
    assert ids == [[A, A]]
    assert scores == [pytest.approx(math.log(0.5 * 0.4 * 0.3))]
    # Of length 3, the end included.
    assert decoded(Table(PROBS), method="greedy")[1] == [pytest.approx(math.log(0.06) / 3)]
    ends = Table({BOS_ID: {A: 0.2, EOS_ID: 0.8}, A: {A: 0.1, EOS_ID: 0.9}})
    assert decoded(ends, method="greedy")[0] == [[A]]
    assert decoded(ends, method="greedy", min_new_tokens=0)[0] == [[]]
    ids, scores = decoded(ends, min_new_tokens=5, num_beams=3)
    assert ids == [[A] * 5]  # beats the maximum of 2
    assert scores == pytest.approx([(math.log(0.2) + 4 * math.log(0.1) + math.log(0.9)) / 6])


def test_beams_by_hand_wait_for_a_better_hypothesis_that_is_still_open():
    # Open after one id: a .5, b .4. Then b-end .36 is finished; a-a .20 and a-b .15 stay open, for a-end .15 is third.
    # At the maximum of 2 both are closed: a-a-end .06, a-b-end .135. The lengths are 2, 3 and 3.
    options = {"num_beams": 2, "num_return_sequences": 2, "num_sentences": 3}
    b, ab = math.log(0.36), math.log(0.135)
    assert decoded(Table(PROBS), length_penalty=0.0, **options) == ([[B], [A, B]], pytest.approx([b, ab]))
    assert decoded(Table(PROBS), length_penalty=1.0, **options) == ([[B], [A, B]], pytest.approx([b / 2, ab / 3]))
    # -1.02 / 4 = -0.255 and -2.00 / 9 = -0.222: a strong penalty prefers the longer one.
    assert decoded(Table(PROBS), length_penalty=2.0, **options) == ([[A, B], [B]], pytest.approx([ab / 9, b / 4]))
    # A sentence is done when no open hypothesis can win. After two steps b-end has .36 and the best open one .20:
    # undivided it cannot rise; divided by 3 ** 2 it might.
    for penalty, steps in ((0.0, 2), (2.0, 3)):
        model = Table(PROBS)
        decoded(model, num_beams=2, length_penalty=penalty)
        assert model.steps == [1, 2, 2][:steps]  # one row until the first choice
    # The end has .02 after begin, .01 after a, .97 after b. With a beam of 2 the ends of 0 and 1 ids are finished
    # first, at log .02 and log(.98 * .01) / 2 = -2.31; the best is a-b-end at log(.98 * .99 * .97) / 3 = -0.02.
    probs = {BOS_ID: {A: 0.98, EOS_ID: 0.02}, A: {B: 0.99, EOS_ID: 0.01}, B: {A: 0.03, EOS_ID: 0.97}}
    options = {"num_beams": 2, "min_new_tokens": 0, "max_length_extra": 5}
    best = [[A, B]], [pytest.approx(math.log(0.98 * 0.99 * 0.97) / 3)]
    assert decoded(Table(probs), **options) == best
    # At its 2 ids a-b has log(.98 * .99) / 2, more than the worst one kept.
    assert decoded(Table(probs), **options, early_stopping=False) == best
    too_early = [[A]], [pytest.approx(math.log(0.98 * 0.01) / 2)]
    assert decoded(Table(probs), **options, early_stopping=True) == too_early


def test_padding_and_begin_are_never_produced_and_of_equals_the_lower_id_goes_first():
    probs = {i: {PAD_ID: 0.5, BOS_ID: 0.3, UNK_ID: 0.12, EOS_ID: 0.08} for i in (BOS_ID, UNK_ID)}
    for method in ("greedy", "beam", "sample"):
        ids, scores = decoded(Table(probs), method=method, min_new_tokens=2, length_penalty=0.0)
        assert ids == [[UNK_ID, UNK_ID]]
        # Their share of the probability is not given to the others.
        assert scores == pytest.approx([math.log(0.12 * 0.12 * 0.08)])
    probs = {BOS_ID: {A: 0.5, B: 0.5}, A: {A: 0.25, B: 0.25, EOS_ID: 0.5}, B: {A: 0.25, B: 0.25, EOS_ID: 0.5}}
    assert decoded(Table(probs), method="greedy", min_new_tokens=2)[0] == [[A, A]]
    ids = decoded(Table(probs), num_beams=3, num_return_sequences=3, min_new_tokens=2)[0]
    assert ids == [[A, A], [A, B], [B, A]]


def test_a_sentence_s_longest_translation_depends_on_its_own_length_and_finished_ones_leave():
    """Limits of 2, 4, 7 and 14 ids, floor(1.5 S + 1), and the end: rows leave after steps 3, 5, 8 and 15."""
    forever = Table({BOS_ID: {A: 0.9, EOS_ID: 0.1}, A: {A: 0.9, EOS_ID: 0.1}})
    config = DecodeConfig(method="greedy", max_length_ratio=1.5, max_length_extra=1)
    pruned = translate_ids(forever, sources([1, 2, 4, 9], VOCAB), config)
    assert [len(ids) for ids in pruned.best] == [2, 4, 7, 14]
    assert forever.steps == [4] * 3 + [3] * 2 + [2] * 3 + [1] * 7
    forever.steps = []
    assert translate_ids(forever, sources([1, 2, 4, 9], VOCAB), replace(config, prune=False)) == pruned
    assert forever.steps == [4] * 15


def test_no_sentences_no_finite_end_and_more_texts_than_hypotheses():
    assert translate_ids(Table(PROBS), torch.zeros(0, 3, dtype=torch.int64), DecodeConfig()).ids == []
    model = Table(PROBS)
    model.table.data.fill_(math.nan)
    for method in ("beam", "greedy", "sample"):
        with pytest.raises(ValueError, match="sentence 0 of the batch has no end with a finite log-probability"):
            decoded(model, method=method)
    for method, most in (("beam", 5), ("greedy", 1)):
        with pytest.raises(
            ValueError, match=f"num_return_sequences=6 exceeds the {most} hypotheses of method={method}"
        ):
            DecodeConfig(method, num_return_sequences=6)


def test_what_an_id_is_drawn_with_and_by_which_draw():
    logits = torch.tensor([0.125, 0.5, 0.125, 0.25], dtype=torch.float64).log()

    def probs(**options: Any) -> list[float]:
        return sampling_probs(logits, DecodeConfig(method="sample", **options)).tolist()

    assert probs() == pytest.approx([0.125, 0.5, 0.125, 0.25])
    assert probs(top_k=2) == pytest.approx([0, 2 / 3, 0, 1 / 3])
    assert probs(top_k=3) == pytest.approx([1 / 7, 4 / 7, 0, 2 / 7])  # of equals the lower id
    assert probs(top_k=9) == probs()
    assert probs(top_p=0.5) == [0, 1, 0, 0]
    assert probs(top_p=0.7) == pytest.approx([0, 2 / 3, 0, 1 / 3])
    assert probs(top_p=0.8) == pytest.approx([1 / 7, 4 / 7, 0, 2 / 7])
    assert probs(top_k=2, top_p=0.66) == [0, 1, 0, 0]  # 2/3 by itself is enough
    assert probs(temperature=0.5) == pytest.approx([1 / 22, 16 / 22, 1 / 22, 4 / 22])  # squares
    assert probs(temperature=0.5, top_p=0.7) == [0, 1, 0, 0]
    # 1,000 draws of one id each: a where the draw is under .75, b above.
    model = Table({BOS_ID: {A: 0.75, B: 0.25}, A: {EOS_ID: 1.0}, B: {EOS_ID: 1.0}})
    config = DecodeConfig(method="sample", num_return_sequences=1000, max_length_ratio=0.0, max_length_extra=1, seed=3)
    out = translate_ids(model, sources([3]), config)
    draws = torch.rand(2, 1000, dtype=torch.float64, generator=generator(3, 0))[0]
    assert sum(ids == [A] for ids in out.ids[0]) == int((draws < 0.75).sum())
    assert 700 < int((draws < 0.75).sum()) < 800


def test_a_sentence_s_draws_depend_on_the_seed_and_its_number_alone():
    model, batch, config = Recurrent(), sources([3, 9, 1, 5]), DecodeConfig("sample", num_return_sequences=2, seed=1)
    out, state = translate_ids(model, batch, config), torch.get_rng_state()
    assert translate_ids(model, batch, config) == out
    assert torch.equal(torch.get_rng_state(), state)
    close(translate_ids(model, batch, replace(config, prune=False)), out)
    assert translate_ids(model, batch, replace(config, seed=2)).ids != out.ids
    for b in range(4):
        alone = translate_ids(model, batch[b : b + 1], config, index_B=torch.tensor([b]))
        assert alone.ids == out.ids[b : b + 1]
    mixed = {"temperature": 2.0, "top_k": 7, "top_p": 0.9}
    for more in ({}, {"top_k": 3}, {"top_p": 0.8}, mixed, {"min_new_tokens": 4}):
        config = DecodeConfig(method="sample", num_return_sequences=3, length_penalty=0.6, **more)
        close(translate_ids(model, batch, config), naive.translate_ids(model, batch, config))


@pytest.mark.parametrize("method, penalty", [("greedy", 0.6), (1, 1.0), (2, 0.0), (2, 2.0), (5, 0.6), (5, 1.0)])
def test_every_id_is_that_of_the_plain_loops(method, penalty):
    search = {"method": "greedy"} if method == "greedy" else {"method": "beam", "num_beams": method}
    beams = search.get("num_beams", 1)
    search |= {"length_penalty": penalty, "num_return_sequences": min(beams, 3)}
    limits = ({"max_length_ratio": 1.5}, {"max_length_ratio": 0.5, "max_length_extra": 0}, {"max_length_ratio": 1.0})
    for (seed, sharpness), more in zip(((0, 3.0), (1, 6.0), (2, 1.0)), limits, strict=True):
        model, batch = Recurrent(seed=seed, sharpness=sharpness), sources([1, 9, 4, 2, 6, 3], seed=seed)
        model.out.data[:, EOS_ID] *= 1 + seed  # its end is often likely or unlikely
        for early_stopping in ("never", False, True) if beams > 1 else ("never",):
            config = DecodeConfig(**search, min_new_tokens=seed, early_stopping=early_stopping, **more)
            fast = translate_ids(model, batch, config)
            close(fast, naive.translate_ids(model, batch, config))
            close(translate_ids(model, batch, replace(config, prune=False)), fast)


def test_scores_are_the_teacher_s_log_probabilities_also_of_fewer_ids_than_beams():
    model, batch = Recurrent(), sources([1, 9, 4, 2, 6, 3])
    for config in (DecodeConfig(length_penalty=0.6), DecodeConfig(method="sample", temperature=2.0, top_k=5)):
        out = translate_ids(model, batch, config)
        for source_S, ids, (score,) in zip(batch, out.best, out.scores, strict=True):
            log_p_LV = model(source_S[None], torch.tensor([[BOS_ID, *ids]]))[0].log_softmax(-1)
            total = sum(log_p_LV[at, i].item() for at, i in enumerate([*ids, EOS_ID]))
            assert score == pytest.approx(total / (len(ids) + 1) ** config.length_penalty, abs=1e-10)
    # Two ids beside the end: fewer hypotheses than the beam has rows in the first steps.
    rows, ids = torch.rand(VOCAB, 3, generator=torch.Generator().manual_seed(0)).tolist(), (A, B, EOS_ID)
    model, batch = Table({i: dict(zip(ids, row, strict=True)) for i, row in enumerate(rows)}), sources([3, 1, 2], VOCAB)
    for k in (2, 5, 9):
        config = DecodeConfig(num_beams=k, num_return_sequences=k, max_length_ratio=0.0, max_length_extra=4)
        close(translate_ids(model, batch, config), naive.translate_ids(model, batch, config))


def test_prompts_of_unequal_length_are_continued_as_each_by_itself():
    model = Recurrent()
    prompts = [[BOS_ID], [BOS_ID, 7, 8, EOS_ID, 9], [BOS_ID, 5, 5]]
    batch = torch.full((3, 5), PAD_ID)
    for row, prompt in zip(batch, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    for config in (
        DecodeConfig(method="greedy", max_length_extra=4),
        DecodeConfig(num_beams=3, num_return_sequences=3, length_penalty=0.6, min_new_tokens=2),
        DecodeConfig(method="sample", num_return_sequences=2, top_p=0.9),
    ):
        out = generate_ids(model, batch, config)
        close(out, naive.generate_ids(model, batch, config))
        close(generate_ids(model, batch, replace(config, prune=False)), out)
        for b, prompt in enumerate(prompts):
            alone = generate_ids(model, torch.tensor([prompt]), config, index_B=torch.tensor([b]))
            close(alone, SimpleNamespace(ids=out.ids[b : b + 1], scores=out.scores[b : b + 1]))
    with pytest.raises(ValueError, match="prompt 1 is empty: it needs one id at least, such as EOS_ID"):
        generate_ids(model, torch.tensor([[BOS_ID], [PAD_ID]]), config)


def transformer(kind: str, vocab: int = 40, **options: Any) -> TranslationModel:
    """Return a model of random weights, large enough that its sentences vary and end at different lengths."""
    moe = {
        "dense": None,
        "top1": core.MoEConfig(num_experts=4, router=core.TokenChoice(top_k=1)),
        "top2": core.MoEConfig(num_experts=4, router=core.TokenChoice(top_k=2), expert=core.SwiGLU()),
        "task": core.MoEConfig(num_experts=4, router=core.Task(num_tasks=2)),
        "capacity": core.MoEConfig(num_experts=4, router=core.TokenChoice(top_k=1), capacity_factor=0.25),
        "own capacity": core.MoEConfig(num_experts=4, capacity_factor=4.0, eval_capacity_factor=0.25),
    }[kind]
    torch.manual_seed(0)
    config = TransformerConfig("nano", tie="none", **options)
    model = TranslationModel(config, source_vocab=vocab, ffn=moe, decoder_moe_blocks="all").double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.7)
        model.output.weight[EOS_ID] *= 1.5
    return model


@pytest.mark.parametrize(
    ("kind", "positions"), [("dense", "learned"), ("top1", "relative"), ("top2", "sinusoidal"), ("task", "rotary")]
)
def test_transformers_with_a_cache_say_what_the_plain_loops_say(kind, positions):
    model = transformer(kind, positions=positions, max_length=14)
    batch, context = sources([1, 9, 4, 2], 40), {"task_ids_B": torch.tensor([0, 1, 1, 0])}
    lengths = set()
    for k, penalty in ((1, 0.0), (3, 1.0)):
        limits = {"max_length_ratio": 1.2, "max_length_extra": 3}
        config = DecodeConfig(num_beams=k, num_return_sequences=min(k, 2), length_penalty=penalty, **limits)
        out = translate_ids(model, batch, config, **context)
        close(out, naive.translate_ids(model, batch, config, **context))
        close(translate_ids(model, batch, replace(config, prune=False), **context), out)
        lengths |= {len(ids) for ids in out.best}
    assert len(lengths) > 2
    assert max(lengths) <= 13 or positions != "learned"  # BOS_ID takes the first of 14 positions


def test_a_sparse_language_model_continues_prompts():
    torch.manual_seed(0)
    moe = core.MoEConfig(num_experts=4, router=core.TokenChoice(top_k=2), capacity_factor=0.25)
    model = LanguageModel(TransformerConfig("nano", positions="rotary", tie="none"), vocab=40, ffn=moe).double().eval()
    prompts = torch.tensor([[BOS_ID, 7, 9, 11], [BOS_ID, PAD_ID, PAD_ID, PAD_ID], [BOS_ID, 8, PAD_ID, PAD_ID]])
    for method in ("greedy", "beam", "sample"):
        config = DecodeConfig(method=method, num_beams=3, max_length_extra=5)
        close(generate_ids(model, prompts, config), naive.generate_ids(model, prompts, config))


def capacities(model: nn.Module) -> list[core.Capacity]:
    return [layer.router.capacity for layer in core.moe_layers(model).values()]


def test_training_s_capacity_is_none_of_decoding_s_and_evaluation_s_is_and_is_told_once(caplog):
    """A capacity counts rows: of 4 at a step an expert would take ceil(0.25 * 4 / 4) = 1, and of one row that row."""
    model = transformer("capacity", vocab=100)
    before, batch, target = capacities(model), sources([5, 9, 4, 7], 100), torch.full((4, 3), BOS_ID)
    limited = model(batch, target)
    for config in (DecodeConfig(num_beams=3, length_penalty=0.6), DecodeConfig(method="greedy")):
        out = translate_ids(model, batch, config)
        close(translate_ids(model, batch, replace(config, prune=False)), out)
        alone = [translate_ids(model, row[row != PAD_ID][None], config) for row in batch]
        close(SimpleNamespace(ids=[h.ids[0] for h in alone], scores=[h.scores[0] for h in alone]), out)
        with core.set_capacity_factor(model, None):
            assert translate_ids(model, batch, config) == out
            assert not torch.equal(model(batch, target), limited)
        assert capacities(model) == before
    assert torch.equal(model(batch, target), limited)  # what is not decoded is evaluated as before
    model.output.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="no end with a finite log-probability"):
        translate_ids(model, batch, config)
    assert capacities(model) == before
    model = transformer("own capacity", vocab=100)
    before = capacities(model)
    warn_once.cache_clear()
    first, second = (translate_ids(model, batch, config) for _ in range(2))
    (warning,) = caplog.messages
    assert warning.startswith("eval_capacity_factor=0.25 holds in decoding too: what comes out can depend on what else")
    with core.set_capacity_factor(model, None):
        assert translate_ids(model, batch, config).scores != first.scores
    assert (first, capacities(model)) == (second, before)
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("vocab", [5, 8, 63, 640, 1345])
@pytest.mark.parametrize(("k", "m"), [(1, 1), (1, 2), (2, 4), (5, 10)])
def test_the_largest_sums_with_equals_by_row_and_id(vocab, k, m):
    g = torch.Generator().manual_seed(vocab)
    for values in (3, 50, 10**6):
        x = torch.randint(values, (9, k, vocab), generator=g).double()
        x[0] = x[1, 0, 0]  # all equal
        x[2, :, m:] = -math.inf  # hardly any
        score = torch.randint(values, (9, k), generator=g).double()
        score[0] = 0.0
        value, place = (x + score[..., None]).flatten(1).sort(stable=True, descending=True, dim=1)
        exact_value, exact_place, tied = top_sums(x, score, m, exact=True)
        assert torch.equal(exact_value, value[:, :m])
        assert torch.equal(exact_place, place[:, :m])
        assert not tied.any()
        fast_value, fast_place, tied = top_sums(x, score, m, exact=False)
        assert torch.equal(fast_value, value[:, :m])
        assert torch.equal(fast_place[~tied], place[~tied, :m])
        assert tied[0]
        assert values < 10**6 or not tied[3:].any()


def test_bfloat16_is_of_a_copy_and_dropout_is_off_and_each_part_s_mode_comes_back():
    model, batch = Recurrent().float(), sources([1, 9, 4, 2])
    weights = {name: p.clone() for name, p in model.named_parameters()}
    config = DecodeConfig(dtype="bfloat16", min_new_tokens=20, max_length_extra=30)
    out = translate_ids(model, batch, config)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    cast = in_dtype(model, "bfloat16")
    assert {p.dtype for p in cast.parameters()} == {torch.bfloat16}
    assert (in_dtype(cast, "bfloat16"), in_dtype(model, None)) == (cast, model)
    close(out, naive.translate_ids(cast, batch, replace(config, dtype=None)), tolerance=1e-5)
    assert out.scores != translate_ids(model, batch, replace(config, dtype=None)).scores

    class Dropping(Recurrent):
        def __init__(self) -> None:
            super().__init__()
            self.dropout, self.frozen = nn.Dropout(0.5), nn.Dropout(0.5)

        def logits(self, h: Tensor) -> Tensor:
            return super().logits(self.frozen(self.dropout(h)))

    model, batch = Dropping(), sources([3, 5])
    model.train()
    model.frozen.eval()
    assert translate_ids(model, batch, DecodeConfig()) == translate_ids(Recurrent(), batch, DecodeConfig())
    assert model.training
    assert model.dropout.training
    assert not model.frozen.training
