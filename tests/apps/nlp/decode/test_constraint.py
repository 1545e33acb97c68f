"""Constrained searches against plain loops, and grammars against every short text of a tiny vocabulary."""

import itertools
import math
import random
from collections.abc import Callable, Sequence

import naive_search as naive
import pytest
import torch
from toy_decoders import Recurrent, Table, close, sources

from apps.data.subwords import EOS_ID, SubwordConfig, Subwords, train_subwords
from apps.nlp.decode import DecodeConfig, generate_ids, translate_ids
from apps.nlp.decode.constraint import Constraint, TextConstraint, TrieConstraint
from apps.nlp.decode.grammar import Chars, Grammar, GrammarConstraint, Ref

LINES = ["ab abab ba aab (ab) ((a)) (b) a, b, a", "12 1 2 21 é éa aé 121", "a b ab ba a b ab (a) abba"] * 3


@pytest.fixture(scope="module")
def subwords() -> Subwords:
    return train_subwords(LINES, LINES, SubwordConfig(vocab_size=300))


def matches(rules: dict, text: str) -> bool:
    """Whether a text is one of a grammar's, by trying each alternative at each place."""

    def ends(part: object, begin: int) -> set[int]:
        if isinstance(part, str):
            return {begin + len(part)} if text.startswith(part, begin) else set()
        if isinstance(part, Ref):
            return set().union(*(of_row(row, begin) for row in rules[part.name]))
        assert isinstance(part, Chars)
        found, end, count = set(), begin, 0
        while True:
            if count >= part.least:
                found.add(end)
            in_run = end < len(text) and (text[end] in part.chars) != part.others and text[end] not in "\t\ufffd"
            if not in_run or count == part.most:
                return found
            end, count = end + 1, count + 1

    def of_row(row: Sequence, begin: int) -> set[int]:
        places = {begin}
        for part in row:
            places = set().union(*(ends(part, place) for place in places))
        return places

    return len(text) in ends(Ref("start"), 0)


GRAMMARS = {
    "nested": {"start": [["a"], ["(", Ref("start"), ")"], ["b", Ref("start")]]},
    "list": {"start": [[Ref("item"), Ref("more")]], "more": [[], [", ", Ref("start")]], "item": [["a"], ["ab"]]},
    "runs": {"start": [[Chars("ab", 1, 2), Chars("12é", 0, 2)], [Chars("1", 2, 2)]]},
    "others": {"start": [["a", Chars("ab ,", 0, others=True), "b"]]},
    "spaces": {"start": [[" a"], ["a b", Chars(" ", 0)], [""]]},
}  # fmt: skip
PIECES = ["▁", "▁a", "a", "b", "ab", "(", ")", ",", "▁b", "1", "é", "<0xC3>", "<0xA9>", "<0x61>", "<0x09>", "2"]


@pytest.mark.parametrize("name", GRAMMARS)
def test_a_grammar_allows_the_ids_whose_text_is_in_it_and_no_others(subwords, name):
    """All sequences of up to 3 of 16 subwords and bytes: 4,369, each decoded."""
    processor, rules = subwords.processor("target"), GRAMMARS[name]
    ids = [processor.piece_to_id(piece) for piece in PIECES]
    assert len(set(ids) - set(range(EOS_ID + 1))) == len(PIECES)
    constraint, accepted = GrammarConstraint(Grammar(rules), subwords), set()
    level = {(): constraint.start()}
    for length in range(4):
        following = {}
        for row, state in level.items():
            allowed = constraint.allowed(state)
            if allowed[EOS_ID]:
                accepted.add(row)
            for i in ids if length < 3 else ():
                if allowed[i]:
                    following[(*row, i)] = constraint.advance(state, i)
        level = following
    every = {row: processor.decode(list(row)) for n in range(4) for row in itertools.product(ids, repeat=n)}
    known = {text: matches(rules, text) for text in {*every.values()}}
    assert accepted == {row for row, text in every.items() if known[text]}
    assert len(accepted) > 10 or name == "spaces"


@pytest.mark.parametrize("name", GRAMMARS)
def test_the_least_number_of_ids_is_within_reach(subwords, name):
    constraint, rng = GrammarConstraint(Grammar(GRAMMARS[name]), subwords), random.Random(0)
    for _ in range(20):
        state = constraint.start()
        for _ in range(rng.randrange(8)):
            ids = [i for i in constraint.allowed(state).nonzero().flatten().tolist() if i != EOS_ID]
            if not ids:
                break
            state = constraint.advance(state, rng.choice(ids))
        while (least := constraint.least(state)) > 0:
            ids = [i for i in constraint.allowed(state).nonzero().flatten().tolist() if i != EOS_ID]
            state = min((constraint.advance(state, i) for i in ids), key=constraint.least)
            assert constraint.least(state) == least - 1
        assert constraint.allowed(state)[EOS_ID]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"start": [[Ref("x")]]}, "rule 'start' refers to rule 'x', which does not exist"),
        ({"other": [["a"]]}, "start='start' is not a rule"),
        ({"start": [["a", Ref("start")]]}, "rule 'start' never ends: a grammar without an end"),
        ({"start": [["a"], [Ref("start"), "b"]]}, r"rule 'start' can start with itself \(left recursion\)"),
        ({"start": [["a"], [Ref("e"), Ref("b")]], "e": [[], ["e"]], "b": [[Ref("start"), "x"]]}, "left recursion"),
        ({"start": [["a", 3]]}, "rule 'start': 3 is not a text, a Ref or Chars"),
        ({"start": [[Chars("")]]}, "never ends"),
        ({f"r{i}": [[Ref(f"r{i + 1}")] * 2] for i in range(60)} | {"r60": [["ab"]], "start": [[Ref("r0")]]}, "65,536"),
    ],
)  # fmt: skip
def test_a_grammar_that_cannot_be_used_is_rejected_in_one_line(rules, message):
    with pytest.raises(ValueError, match=message) as error:
        Grammar(rules)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="least=2, most=1"):
        Chars("a", 2, 1)
    with pytest.raises(ValueError, match="only ASCII characters can be left out"):
        Chars("é", others=True)


def test_given_texts_are_a_grammar_of_alternatives_and_ids_that_the_subwords_lack_are_never_taken(subwords):
    texts = ["ab", "abba", "a b", "(a)", "é1", "12"]
    tries = (
        TrieConstraint([*texts, " ab "], subwords),
        GrammarConstraint(Grammar({"start": [[t] for t in texts]}), subwords),
    )
    todo, seen = [tuple(c.start() for c in tries)], 0
    while todo:
        states, seen = todo.pop(), seen + 1
        allowed = [c.allowed(s) for c, s in zip(tries, states, strict=True)]
        assert torch.equal(*allowed)
        assert tries[0].least(states[0]) == tries[1].least(states[1])
        if seen < 200:
            ids = [i for i in allowed[0].nonzero().flatten().tolist() if i != EOS_ID]
            todo += [tuple(c.advance(s, i) for c, s in zip(tries, states, strict=True)) for i in ids]
    with pytest.raises(ValueError, match=r"texts=\[\]: a constraint needs one text at least"):
        TrieConstraint([], subwords)
    model, size, rng = Recurrent(subwords.size("target") + 7), subwords.size("target"), random.Random(0)
    model.out.data[:, size:] *= 9.0
    batch, texts = sources([2, 9], size), ["".join(rng.choices("ab 12é(),", k=12)).strip() for _ in range(10_000)]
    assert max(map(max, translate_ids(model, batch, DecodeConfig("greedy")).best)) >= size
    out = translate_ids(model, batch, DecodeConfig("greedy"), constraints=[TrieConstraint(texts, subwords)] * 2)
    assert set(subwords.decode(out.best, "target")) <= set(texts)


# ---- in a search


def masked(next_log_probs: Callable, begin: int, texts: Sequence[str], subwords: Subwords) -> Callable:
    """The log-probabilities of ids after which a text is still the start of one of ``texts``."""
    decode, surfaces = subwords.processor("target").decode, subwords.surfaces("target")

    def log_probs(ids: list[int]) -> list[float]:
        written, log_p = ids[begin:], next_log_probs(ids)

        def fits(i: int) -> bool:
            if i == EOS_ID:
                return decode(written) in texts
            return surfaces[i] is not None and any(own.startswith(decode([*written, i])) for own in texts)

        return [p if fits(i) else -math.inf for i, p in enumerate(log_p)]

    return log_probs


SEARCHES = {
    "greedy": DecodeConfig("greedy"),
    "beam": DecodeConfig("beam", num_beams=4, num_return_sequences=3),
    "unpruned": DecodeConfig("beam", num_beams=3, prune=False),
    "sample": DecodeConfig("sample", num_return_sequences=3, temperature=2.0, seed=5),
}


@pytest.mark.parametrize("method", SEARCHES)
def test_a_constrained_search_is_that_of_the_plain_loops(subwords, method):
    """Each sentence has another set of texts, which subwords and bytes spell in many ways."""
    model, config = Recurrent(subwords.size("target")), SEARCHES[method]
    batch = sources([3, 7, 5], subwords.size("target"))
    texts = [["ab", "abba (a)", "b"], ["12", "121 2", "a b"], ["(a) (b)", "(ab)"]]
    out = translate_ids(model, batch, config, constraints=[TrieConstraint(own, subwords) for own in texts])
    each, original = iter(texts), naive._best

    def best(log_probs, prompt, *rest):
        return original(masked(log_probs, len(prompt), next(each), subwords), prompt, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(naive, "_best", best)
        close(out, naive.translate_ids(model, batch, config))
    for own, ids in zip(texts, out.ids, strict=True):
        assert set(subwords.decode(ids, "target")) <= set(own)


@pytest.mark.parametrize("name, method", [*zip(GRAMMARS, [*SEARCHES, "beam"], strict=True)])
def test_whatever_the_limit_the_text_is_in_the_language(subwords, name, method):
    """Also where it cuts: prompts of other lengths, limits from the shortest text on."""
    model, constraint = Recurrent(subwords.size("target"), seed=3), GrammarConstraint(Grammar(GRAMMARS[name]), subwords)
    decode = subwords.processor("target").decode
    for limit in (1, 2, 3, 7):
        config = DecodeConfig(**{**vars(SEARCHES[method]), "max_new_tokens": limit, "min_new_tokens": 0})
        found = generate_ids(model, sources([2, 5, 3], 290), config, constraints=[constraint] * 3)
        for ids in itertools.chain(*found.ids):
            assert len(ids) <= limit
            assert matches(GRAMMARS[name], decode(ids))


def test_a_text_that_does_not_fit_is_an_error_that_names_the_sentence(subwords, monkeypatch):
    model, batch = Recurrent(subwords.size("target")), sources([3, 4], 290)
    free, long = TrieConstraint(["a"], subwords), TrieConstraint(["12é(,21é)"], subwords)
    least, walks, walk = long.least(long.start()), [], TextConstraint._walk
    message = rf"sentence 1 of the batch may have {least - 1} tokens: .* allows has {least}"
    with pytest.raises(ValueError, match=message):
        translate_ids(model, batch, DecodeConfig("greedy", max_new_tokens=least - 1), constraints=[free, long])
    found = translate_ids(model, batch, DecodeConfig("greedy", max_new_tokens=least), constraints=[free, long])
    assert subwords.decode(found.best, "target") == ["a", "12é(,21é)"]
    with pytest.raises(ValueError, match=r"stop_strings=\['x'\]: a constraint says where a text ends"):
        translate_ids(model, batch, DecodeConfig(stop_strings=["x"]), constraints=[free, free])
    # A constraint is read only once a state.
    monkeypatch.setattr(TextConstraint, "_walk", lambda self, state: walks.append(state) or walk(self, state))
    others = GrammarConstraint(Grammar(GRAMMARS["others"]), subwords)
    translate_ids(model, sources([9] * 8, 290), DecodeConfig("greedy"), constraints=[others] * 8)
    assert len(walks) == len(set(walks))


class Turns(Constraint):
    """Ids 4 and 5 in turn, an even number of them; at most ``most``."""

    def __init__(self, most: int = 100) -> None:
        self.most = most

    def start(self):
        return 0

    def allowed(self, state):
        return torch.tensor([i == (4 + state % 2 if state < self.most else EOS_ID) for i in range(6)])

    def advance(self, state, token_id):
        return state + 1

    def least(self, state):
        return self.most - state


@pytest.mark.parametrize("method", ["greedy", "beam", "sample"])
def test_any_object_with_the_methods_is_a_constraint(method):
    probs = {2: {4: 0.2, 5: 0.7, EOS_ID: 0.1}, 4: {4: 0.9, 5: 0.05, EOS_ID: 0.05}, 5: {4: 0.5, EOS_ID: 0.5}}
    model, source = Table(probs), torch.full((1, 3), EOS_ID)
    config = DecodeConfig(method, max_new_tokens=4, min_new_tokens=4)
    assert translate_ids(model, source, config, constraints=[Turns(4)]).best == [[4, 5, 4, 5]]
    with pytest.raises(ValueError, match="sentence 0 of the batch has no end with a finite log-probability"):
        translate_ids(model, source, config, constraints=[Turns(2)])
