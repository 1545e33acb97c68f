"""Options of a search, by hand and against plain loops: min_p, penalties, stop strings, lengths, and texts told."""

import math

import naive_search as naive
import pytest
import torch
from toy_decoders import A, B, Recurrent, State, Table, sources

from apps.data.subwords import BOS_ID, EOS_ID, PAD_ID, SubwordConfig, Subwords, train_subwords
from apps.nlp.decode import DecodeConfig, generate_ids, translate_ids
from apps.nlp.decode.sampling import sampling_probs
from apps.nlp.decode.stops import Stops, num_begun

LINES = ["the end of the story. User: what? User said so", "a stop at the end, the user stops"] * 3


@pytest.fixture(scope="module")
def subwords() -> Subwords:
    return train_subwords(LINES, LINES, SubwordConfig(vocab_size=330))


def test_min_p_keeps_what_is_probable_enough_beside_the_best():
    logits = torch.tensor([0.125, 0.5, 0.125, 0.25], dtype=torch.float64).log()

    def probs(**options):
        return sampling_probs(logits, DecodeConfig(method="sample", **options)).tolist()

    assert probs(min_p=0.5) == pytest.approx([0, 2 / 3, 0, 1 / 3])
    assert probs(min_p=0.51) == [0, 1, 0, 0]
    assert probs(min_p=0.25) == pytest.approx([0.125, 0.5, 0.125, 0.25])
    assert probs(min_p=0.5, temperature=0.5) == [0, 1, 0, 0]  # squares: 1/4 of the best
    # top_p first, of all: .5 is less than .6, and .5 + .25 is enough
    assert probs(min_p=0.4, top_p=0.6) == pytest.approx([0, 2 / 3, 0, 1 / 3])
    with pytest.raises(ValueError, match=r"min_p=1.5 is not in \[0, 1\]"):
        DecodeConfig(min_p=1.5)


def test_a_penalty_by_hand():
    """Logits of a and of the end are 2 and 1; after a, they are 2 / 4 and 1: the text ends."""
    model = Table({})
    model.table.data[:] = -1e4
    model.table.data[[BOS_ID, A], A], model.table.data[[BOS_ID, A], EOS_ID] = 2.0, 1.0
    limits = {"max_new_tokens": 5}
    free = translate_ids(model, sources([3]), DecodeConfig("greedy", **limits))
    assert free.best == [[A] * 5]
    out = translate_ids(model, sources([3]), DecodeConfig("greedy", repetition_penalty=4.0, **limits))
    assert out.best == [[A]]
    log_p = [2 - math.log(math.exp(2) + math.exp(1)), 1 - math.log(math.exp(0.5) + math.exp(1))]
    assert out.scores[0][0] == pytest.approx(sum(log_p) / 2)


def penalized(model, penalty):
    """Next log-probabilities after all ids, with those of the ids penalized in a plain loop."""

    def next_log_probs(ids):
        logits = model(torch.tensor([ids]))[0, -1].tolist()
        for i in set(ids):
            logits[i] = logits[i] / penalty if logits[i] > 0 else logits[i] * penalty
        return torch.tensor(logits, dtype=torch.float64).log_softmax(-1).tolist()

    return next_log_probs


@pytest.mark.parametrize("method, penalty", [("greedy", 1.7), ("beam", 0.6), ("beam", 1.7), ("sample", 0.6)])
def test_a_penalty_is_that_of_the_plain_loops_in_each_method(method, penalty):
    """Prompts of other lengths count; finished sentences leave, and beams are reordered."""
    model, prompts = Recurrent(), sources([4, 1, 6])
    config = DecodeConfig(method, num_beams=4, repetition_penalty=penalty, max_new_tokens=8)
    out = generate_ids(model, prompts, config)
    for b, row in enumerate(prompts):
        prompt = row[row != PAD_ID].tolist()
        (ids, score), *_ = naive._best(penalized(model, penalty), prompt, len(prompt), config, model, b)
        assert out.best[b] == ids
        assert out.scores[b][0] == pytest.approx(score)
    assert out.best != generate_ids(model, prompts, DecodeConfig(method, num_beams=4, max_new_tokens=8)).best


def test_a_number_of_new_tokens_counts_and_ids_are_told_as_they_grow():
    config = DecodeConfig(max_new_tokens=7, max_length_ratio=3.0, max_length_extra=5)
    assert [config.max_length(n) for n in (1, 100)] == [7, 7]
    assert config.max_length(100, most=6) == 6
    assert DecodeConfig(max_new_tokens=2, min_new_tokens=4).max_length(9) == 4
    assert DecodeConfig(max_length_ratio=3.0, max_length_extra=5).max_length(2) == 11
    model = Table({BOS_ID: {A: 0.9, B: 0.1}, A: {B: 0.9, EOS_ID: 0.1}, B: {EOS_ID: 1.0}})
    for method, told in (("greedy", [[A], [A, B]]), ("sample", [[A], [A, B]]), ("beam", [])):
        heard: list[list[int]] = []
        config = DecodeConfig(method, top_k=1)
        assert translate_ids(model, sources([3]), config, tell=heard.append).best == [[A, B]]
        assert heard == told


class Scripted(torch.nn.Module):
    """Writes given ids; the end after them. Position is what it has read."""

    def __init__(self, ids, size, prompt=1):
        super().__init__()
        self.ids, self.size, self.read, self.prompt = ids, size, 0, prompt

    def encode(self, source, task=None, domain=None):
        return source

    def start(self, memory, task=None, domain=None):
        self.read = 0
        return State(torch.zeros(memory if isinstance(memory, int) else len(memory)))

    def step(self, token, cache):
        self.read += 1
        logits = torch.full((len(token), self.size), -20.0, dtype=torch.float64)
        place = self.read - self.prompt
        logits[:, self.ids[place] if 0 <= place < len(self.ids) else EOS_ID] = 0.0
        return logits


@pytest.mark.parametrize("method", ["greedy", "beam", "sample"])
def test_the_text_ends_before_a_stop_string_wherever_subwords_are_cut(subwords, method):
    """In three spellings of one text: of the model's subwords, in bytes, and in both."""
    text, processor = "the end of the story. é\nUser", subwords.processor("target")
    as_bytes = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    ids, surfaces = processor.encode(text), subwords.surfaces("target")
    stops = ["end", "e", "d of", "th", " story", "story.", "\n", "é", "the", "zz"]  # the last does not come
    for row in (ids, as_bytes, [*ids[:3], *as_bytes[len(processor.decode(ids[:3]).encode()) :]]):
        assert processor.decode(row) == text
        model = Scripted(row, subwords.size("target"))
        for stop in stops[:: 1 if method == "greedy" else 3]:
            config = DecodeConfig(method, num_beams=3, stop_strings=[stop], max_new_tokens=60)
            (own,) = translate_ids(model, sources([3]), config, surfaces=surfaces).best
            assert processor.decode(own) == text.split(stop)[0], stop


def test_a_stop_string_in_the_prompt_does_not_count_and_a_leading_space_does(subwords):
    processor, surfaces = subwords.processor("target"), subwords.surfaces("target")
    prompt, ids = [EOS_ID, *processor.encode("User said")], processor.encode("so the end")
    model = Scripted(ids, subwords.size("target"), prompt=len(prompt))

    def written(*stops):
        config = DecodeConfig("greedy", stop_strings=stops, max_new_tokens=20)
        found = generate_ids(model, torch.tensor([prompt]), config, surfaces=surfaces)
        return processor.decode([*prompt, *found.best[0]])

    assert written("User", " said") == "User said so the end"
    assert written(" so") == "User said"
    assert written("end", "the") == "User said so "


def test_the_id_that_completes_a_stop_string_is_scored_as_the_end_and_what_may_become_one_is_counted():
    surfaces = [None, None, None, None, b"a", b"b"]
    model = Table({BOS_ID: {A: 0.5, B: 0.5}, A: {A: 0.1, B: 0.8, EOS_ID: 0.1}, B: {A: 0.5, EOS_ID: 0.5}})
    config = DecodeConfig("beam", num_beams=2, num_return_sequences=2, stop_strings=["ab"], max_new_tokens=4)
    out = translate_ids(model, sources([3]), config, surfaces=surfaces)
    assert out.ids[0][0] == []
    assert out.scores[0][0] == pytest.approx((math.log(0.5) + math.log(0.8)) / 2)
    assert out.ids[0][1] == [B]  # from "bab"
    assert out.scores[0][1] == pytest.approx(math.log(0.5 * 0.5 * 0.8) / 3)
    with pytest.raises(ValueError, match=r"stop_strings=\['ab'\] needs the surfaces of ids"):
        translate_ids(model, sources([3]), config)
    with pytest.raises(ValueError, match=r"stop_strings\[0\]='' has length 0"):
        DecodeConfig(stop_strings=[""])
    assert DecodeConfig(stop_strings=["a"]).stop_strings == ("a",)
    assert num_begun("say: Us", ["User", "x"]) == 2
    assert num_begun("say: User", ["User"]) == 0  # it is one
    assert num_begun("a", ["ab", "cab"]) == 1
    assert num_begun("ca", ["ab", "cab"]) == 2
    assert Stops(["ab"], [b"xa", b"bx", None]).cut([0, 2, 1], [0]) == []  # "x" has no id of its own
