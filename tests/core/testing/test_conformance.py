"""Every gate keeps every property it claims, and the suite finds gates that do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from unittest import mock

import pytest
import torch
from torch import Tensor

import core
from core import ExpertChoice, Hash, Merge, MixtureOfTokens, ProductKeys, Random, ReLURouting, RouterConfig, TokenChoice
from core.kernels import cpu
from core.routing.gates import LinearGate
from core.routing.router import PairRouter, Tokens
from core.routing.selection import Capacity, Choice
from core.testing import CHECKS, Property, check_router, properties

NEEDED = {"vocab_size": 7, "num_tasks": 3, "num_domains": 8}
"""Values of the options that have no default."""
NUM_EXPERTS = {"product keys": 9, "product keys, batch norm": 9, "dselect-k of six": 6}
"""Other numbers than 8."""
# In place of a config's defaults, where these do not show all that it can do; the first of a kind is checked the most.
VARIANTS: dict[str, RouterConfig] = {
    "mixtral": TokenChoice(2),
    "switch": TokenChoice(1, jitter_eps=0.1),
    "gshard": TokenChoice(2, second_expert_policy="random"),
    "shazeer": TokenChoice(4, noise="learned"),
    "v-moe": TokenChoice(2, normalize=False, noise="fixed"),
    "deepseek-v3": TokenChoice(3, score_func="sigmoid", expert_bias=True, num_groups=4, limited_groups=2, scale=2.5),
    "llama-4": TokenChoice(1, score_func="sigmoid", gates_on="input"),
    "gpt-oss": TokenChoice(4, gate_bias=True),
    "skywork": TokenChoice(2, logit_norm=1.0),
    "deepseek-v4": TokenChoice(3, score_func="sqrt_softplus", expert_bias=True, scale=1.5),
    "dbrx": TokenChoice(3, norm_order=2.0),
    "gemma-4": TokenChoice(3, input_norm=True, expert_scale=True),
    "nllb": TokenChoice(2, normalize="kept", scale=0.8),
    "unit gates": TokenChoice(1, normalize="unit"),
    "ensemble": core.Ensemble(top_k=2),
    "expert choice": ExpertChoice(),
    "diffmoe": ExpertChoice(predictor_dim=8),
    "token rounding": core.TokenRounding(tile=4),
    "product keys": ProductKeys(top_k=3, heads=2),
    "product keys, batch norm": ProductKeys(top_k=4, heads=2, query_dim=6, query_norm="batch", shared_keys=False),
    "hash": Hash(7),
    "hash, balanced": Hash(7, "balanced", top_k=2),
    "hash, learned gates": Hash(7, top_k=3, score_func="sqrt_softplus", scale=1.5),
    "hash, learned gate": Hash(7, score_func="sigmoid"),
    "remoe": ReLURouting(2),
    "rankmixer": ReLURouting(2, max_k=4, dense_training=True),
    "random": Random(2),
    "random, averaged": Random(evaluation="average", per="sequence"),
    "random, merged": Random(evaluation="merged", per="batch"),
    "domain, random": core.DomainRandom(num_domains=4, vocab_size=7),
    "sinkhorn": core.Sinkhorn(),
    "sinkhorn of two": core.Sinkhorn(top_k=2, iterations=3, score_func="sigmoid"),
    "dselect-k": core.DSelectK(),
    "dselect-k, static": core.DSelectK(per_token=False),
    "dselect-k of six": core.DSelectK(top_k=2, eval_max_k=3),
    "dense": core.Dense(),
    "dense, sparse in evaluation": core.Dense(eval_top_k=2),
    "dense to sparse": core.DenseToSparse(),
    "dense to 3": core.DenseToSparse(max_k=3),
    "soft slots": core.SoftSlots(2),
    "mixture of tokens": MixtureOfTokens(group_size=2),
    "mixture of tokens, annealed": MixtureOfTokens(group_size=2, tau_start=2.0, tau_end=0.5, anneal_steps=3),
    "smear": Merge("smear", expert_dropout=0.3),
    "meo": Merge("meo"),
    "lory": Merge("lory", segment_length=2),
    "lory, own first": Merge("lory", segment_length=2, first="own"),
}
OF_PAIRS = {
    "an expert computes as many pairs as chose it, up to its capacity",
    "saved, loaded, copied and pickled, a layer gives the same output",
    "the tape tells loads, drops and entropies",
    "every backend gives the oracle's output and gradients",
    "the same seed gives the same training step",
}
"""Properties of what a module's routers share."""
OF_THE_LAYER = OF_PAIRS | {
    "without a capacity limit every chosen pair is computed",
    "without tokens, with one and with padding alone there is an output, a loss and a gradient",
    "padding is the same as no token",
    "other sequences do not change a sequence's output",
    "other tokens do not change a token's output",
    "with capacity by sequence, other sequences do not change a sequence's output",
    "the order of the tokens does not matter",
    "the order of the sequences does not matter",
    "a forward changes no state",
}
"""Properties that a further setting of gates cannot break, but for those that mix tokens."""
MIXING = (ExpertChoice, MixtureOfTokens, Merge, ProductKeys, Random)
COMPILED = {f"core.routing.pairs.{module}" for module in ("token_choice", "adaptive", "assignment", "smooth")}
"""Modules of which other tests compile a router."""


def routers_of_core(base: type = RouterConfig) -> list[type[RouterConfig]]:
    """Return every router config of the tree: a new one is checked without a line here."""
    below = [kind for sub in base.__subclasses__() for kind in (sub, *routers_of_core(sub))]
    kinds = [kind for kind in below if kind.__module__.startswith("core.") and hasattr(kind, "router_class")]
    return list(dict.fromkeys(kinds))


def variants_of(kind: type[RouterConfig]) -> dict[str, RouterConfig]:
    needed = {f.name: NEEDED[f.name] for f in fields(kind) if f.default is MISSING}
    return {n: c for n, c in VARIANTS.items() if type(c) is kind} or {kind.__name__: kind(**needed)}


def cases() -> list[object]:
    params, seen = [], set[str]()
    for kind in routers_of_core():
        for place, (name, config) in enumerate(variants_of(kind).items()):
            for prop in properties(config, num_experts=NUM_EXPERTS.get(name, 8)):
                if prop.name.startswith("torch."):  # takes a second: one router of a module, the export of the others
                    is_slow = place > 0 or (kind.__module__ in seen | COMPILED) == prop.name.startswith("torch.compile")
                elif place > 0:
                    is_slow = prop.name in OF_THE_LAYER and kind not in MIXING
                else:
                    is_slow = prop.name in OF_PAIRS and kind.__module__ in seen
                marks = [pytest.mark.slow] if is_slow else []
                params.append(pytest.param(prop, id=f"{name}: {prop}", marks=marks))
        seen.add(kind.__module__)
    return params


@pytest.mark.parametrize("prop", cases())
def test_gate(prop: Property):
    prop.check()


# Gates with one fault each.


CHANGED: dict[str, Callable[[FaultyRouter, Tensor], Tensor]] = {
    "sees the batch": lambda router, x: x - x.mean((0, 1)),
    "sees the sequence": lambda router, x: x + x.sum(1, keepdim=True),
    "sees the next token": lambda router, x: x + x.roll(-1, 1),
    "counts padding in a mean": lambda router, x: x + x.mean(1, keepdim=True),
    "sees the position": lambda router, x: x * torch.arange(x.shape[1])[:, None],
    "is random in evaluation": lambda router, x: x + 0.1 * torch.randn_like(x),
    "has a random state of its own": lambda router, x: x * router.count,
    "is not saved": lambda router, x: x * router.own,
    "asks the first token": lambda router, x: x - 0 * x.flatten(0, 1)[0],
}
"""What a router with a fault makes of its tokens."""


@dataclass(frozen=True)
class Faulty(RouterConfig):
    """Top-2 with a fault, and claims that do not mention it."""

    fault: str = ""

    @property
    def terms(self) -> frozenset[str]:
        if self.fault == "cuts the gradient":
            return frozenset()
        terms = frozenset({"load_balancing_loss", "router_z_loss"})
        return terms | {"load"} if self.fault == "names a term that it has not" else terms

    def make_gate(self, dim: int, num_experts: int) -> LinearGate:
        return LinearGate(dim, num_experts)

    def pairs_per_token(self, num_experts: int) -> float:
        return 2.0

    @property
    def depends_on(self) -> str:
        return "sequence" if self.fault == "counts padding in a mean" else "token"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("task_ids_B",) if self.fault == "does not ask" else ()

    def num_params(self, dim: int, num_experts: int) -> int:
        return dim * num_experts + (self.fault == "forgets a parameter")

    def flops_per_token(self, dim: int, num_experts: int) -> int:
        return dim * num_experts * (1 if self.fault == "counts a multiply-add as one" else 2)


class FaultyRouter(PairRouter):
    config: Faulty

    def __init__(self, dim: int, num_experts: int, config: Faulty, capacity: Capacity) -> None:
        super().__init__(dim, num_experts, config, capacity)
        self.register_buffer("calls", torch.zeros(()))
        self.count, self.own = 0, torch.randn(dim)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.config.fault != "does not reset":
            self.calls.zero_()

    def check_context(self, context: core.RoutingContext | None) -> None:
        if self.config.fault != "does not ask":
            super().check_context(context)

    def choose(self, tokens: Tokens) -> Choice:
        fault = self.config.fault
        if fault == "keeps a state":
            self.calls += 1
        elif fault == "has a random state of its own":
            self.count += 1
        x_BSD = tokens.x_TD.unflatten(0, (tokens.num_sequences, tokens.length))
        x_TD = CHANGED[fault](self, x_BSD).flatten(0, 1) if fault in CHANGED else tokens.x_TD
        if fault == "asks the host" and float(x_TD.detach().sum()) > 0:
            x_TD = x_TD + 0.0
        elif fault == "fixes the number of tokens":
            x_TD = x_TD + torch.zeros(len(x_TD), 1)
        logits_TE = self.gate(x_TD)
        scores_TE = logits_TE.softmax(-1)
        best = scores_TE.topk(2, dim=-1)
        ids_TK, gates_TK = best.indices, best.values
        if fault == "cuts the gradient":
            gates_TK = gates_TK.detach()
        elif fault == "doubles the gradient":
            gates_TK = 2 * gates_TK - gates_TK.detach()
        elif fault == "takes an expert twice":
            ids_TK = ids_TK[:, :1].expand(-1, 2)
        return Choice(ids_TK, gates_TK, core.Evidence(scores_TE, logits_TE))

    def forward(self, x: Tensor, context: core.RoutingContext | None = None) -> object:
        fault = self.config.fault
        if fault == "routes under autocast":
            with mock.patch("torch.autocast.__enter__"), mock.patch("torch.autocast.__exit__"):
                return super().forward(x, context)
        if fault == "reads padding":
            x = x + 0 * x.sum()
        if fault == "ignores its capacity":
            self.capacity = Capacity()
        routing = super().forward(x, context)
        if fault == "miscounts":
            return replace(routing, tokens_per_expert_E=routing.tokens_per_expert_E.flip(0))
        if fault == "forgets what is padding":
            return replace(routing, valid_T=None)
        return routing


Faulty.router_class = FaultyRouter


FOUND_BY = {
    "sees the batch": "other sequences do not change a sequence's output",
    "sees the sequence": "other tokens do not change a token's output",
    "sees the next token": "later tokens do not change earlier outputs",
    "counts padding in a mean": "padding is the same as no token",
    "sees the position": "the order of the tokens does not matter",
    "is random in evaluation": "nothing is random in evaluation",
    "has a random state of its own": "the same seed gives the same training step",
    "keeps a state": "a forward changes no state",
    "does not reset": "built on the meta device, emptied and reset, a layer starts as any other",
    "is not saved": "saved, loaded, copied and pickled, a layer gives the same output",
    "asks the first token": "without tokens, with one and with padding alone there is an output, a loss and a gradient",
    "asks the host": "torch.compile goes through without a graph break, to the same step",
    "fixes the number of tokens": "torch.export goes through, for any number of tokens",
    "cuts the gradient": "every weight of the router learns in training",
    "doubles the gradient": "the gradient is that of the output, in float64",
    "takes an expert twice": "the pairs are counted, within range, and padding is in none",
    "miscounts": "the pairs are counted, within range, and padding is in none",
    "routes under autocast": "half precision and autocast leave the decision in float32",
    "reads padding": "padding comes out as zero and may hold anything",
    "ignores its capacity": "an expert computes as many pairs as chose it, up to its capacity",
    "forgets what is padding": "the tape tells loads, drops and entropies",
    "names a term that it has not": "the balance losses are finite, and each that applies is there",
    "does not ask": "what the gate needs of the context is asked for by name",
    "forgets a parameter": "num_params is the sum of numel",
    "counts a multiply-add as one": "flops_per_token is what a counter counts",
}


@pytest.mark.parametrize("fault", FOUND_BY)
def test_a_fault_is_found_by_the_property_that_it_breaks(fault):
    (prop,) = [p for p in properties(Faulty(fault)) if p.name == FOUND_BY[fault]]
    (sound,) = [p for p in properties(replace(Faulty(fault), fault="")) if p.name == prop.name] or [None]
    if sound is not None:
        sound.check()
    with pytest.raises(Exception) as error:
        prop.check()
    assert not isinstance(error.value, TypeError | AttributeError | NotImplementedError)  # the gate is at fault


def test_a_wrong_kernel_is_found():
    right = cpu.expert_ffn
    wanted = ("the output is the sum of its pairs", "every backend gives the oracle's output and gradients")
    chosen = [p for p in properties(TokenChoice()) if p.name in wanted]
    assert len(chosen) == 2
    for prop in chosen:
        prop.check()
        off = mock.patch.object(cpu, "expert_ffn", lambda *args, **kwargs: 1.0001 * right(*args, **kwargs))
        with off, pytest.raises(AssertionError, match="is off by"):
            prop.check()


def test_check_router_names_each_property_that_fails_and_leaves_the_random_generator(monkeypatch):
    compilers_left_out = [check for check in CHECKS if not check.name.startswith("torch.")]
    monkeypatch.setattr(core.testing, "CHECKS", compilers_left_out)
    with pytest.raises(AssertionError) as error:
        check_router(Faulty("sees the batch"))
    first, *lines = str(error.value).splitlines()
    assert "properties of Faulty(fault='sees the batch') do not hold" in first
    names = [line.strip().split(":")[0] for line in lines]
    assert "other sequences do not change a sequence's output" in names
    assert "num_params is the sum of numel" not in names
    before = torch.random.get_rng_state()
    check_router(Faulty(), num_experts=4, dim=8, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("fact", "value", "left_out"),
    [
        ("reads_position", True, "the order of the tokens does not matter"),
        ("reads_batch_index", True, "the order of the sequences does not matter"),
        ("has_exact_gradient", False, "the gradient is that of the output, in float64"),
    ],
)
def test_a_fact_says_which_check_does_not_apply(fact, value, left_out):
    odd = type("Odd", (Faulty,), {fact: value})
    assert {p.name for p in properties(Faulty())} - {p.name for p in properties(odd())} == {left_out}


def test_a_router_that_does_not_fit_is_refused_and_every_router_is_public():
    with pytest.raises(ValueError, match=r"top_k=9 exceeds num_experts=8"):
        properties(TokenChoice(9))
    names = [check.name for check in CHECKS]
    assert len(names) == len(set(names)) > 25
    kinds = routers_of_core()
    assert len(kinds) == len({kind.__name__ for kind in kinds}) >= 25
    assert [kind for kind in kinds if getattr(core, kind.__name__, None) is not kind] == []
