"""Every gate keeps every property it claims, and the suite finds gates that do not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, replace
from unittest import mock
from zlib import crc32

import pytest
import torch
from torch import Tensor

import core
from core import (
    DomainRandom,
    Ensemble,
    Evidence,
    ExpertChoice,
    Hash,
    Merge,
    MixtureOfTokens,
    ProductKeys,
    Random,
    ReLURouting,
    RouterConfig,
    RoutingContext,
    SoftSlots,
    TokenChoice,
    TokenRounding,
)
from core.kernels import cpu
from core.routing.gates import LinearGate
from core.routing.router import PairRouter, Tokens
from core.routing.selection import Capacity, Choice
from core.testing import CHECKS, Property, check_router, properties

NEEDED = {"vocab_size": 7, "num_tasks": 3, "num_domains": 8}
"""Values of the options that have no default."""
DEEPSEEK = TokenChoice(3, score_func="sigmoid", expert_bias=True, num_groups=4, limited_groups=2, scale=2.5)
# In place of a config's defaults, where these do not show all that it can do.
VARIANTS: dict[type[RouterConfig], dict[str, RouterConfig]] = {
    TokenChoice: {
        "mixtral": TokenChoice(2),
        "switch": TokenChoice(1, jitter_eps=0.1),
        "gshard": TokenChoice(2, second_expert_policy="random"),
        "shazeer": TokenChoice(4, noise="learned"),
        "v-moe": TokenChoice(2, normalize=False, noise="fixed"),
        "deepseek-v3": DEEPSEEK,
        "llama-4": TokenChoice(1, score_func="sigmoid", gates_on="input"),
        "gpt-oss": TokenChoice(4, gate_bias=True),
        "skywork": TokenChoice(2, logit_norm=1.0),
        "deepseek-v4": TokenChoice(3, score_func="sqrt_softplus", expert_bias=True, scale=1.5),
        "dbrx": TokenChoice(3, norm_order=2.0),
        "gemma-4": TokenChoice(3, input_norm=True, expert_scale=True),
        "nllb": TokenChoice(2, normalize="kept", scale=0.8),
        "unit gates": TokenChoice(1, normalize="unit"),
    },
    Ensemble: {"ensemble": Ensemble(top_k=2)},
    ExpertChoice: {"expert choice": ExpertChoice(), "diffmoe": ExpertChoice(predictor_dim=8)},
    TokenRounding: {"token rounding": TokenRounding(tile=4)},
    ProductKeys: {
        "product keys": ProductKeys(top_k=3, heads=2),
        "product keys, batch norm": ProductKeys(top_k=4, heads=2, query_dim=6, query_norm="batch", shared_keys=False),
    },
    Hash: {
        "hash": Hash(7),
        "hash, balanced": Hash(7, "balanced", top_k=2),
        "hash, learned gates": Hash(7, top_k=3, score_func="sqrt_softplus", scale=1.5),
        "hash, learned gate": Hash(7, score_func="sigmoid"),
    },
    ReLURouting: {
        "remoe": ReLURouting(2),
        "rankmixer": ReLURouting(2, max_k=4, dense_training=True),
    },
    Random: {
        "random": Random(2),
        "random, averaged": Random(evaluation="average", per="sequence"),
        "random, merged": Random(evaluation="merged", per="batch"),
    },
    DomainRandom: {"domain, random": DomainRandom(num_domains=4, vocab_size=7)},
    SoftSlots: {"soft slots": SoftSlots(2)},
    MixtureOfTokens: {
        "mixture of tokens": MixtureOfTokens(group_size=2),
        "mixture of tokens, annealed": MixtureOfTokens(group_size=2, tau_start=2.0, tau_end=0.5, anneal_steps=3),
    },
    Merge: {
        "smear": Merge("smear", expert_dropout=0.3),
        "meo": Merge("meo"),
        "lory": Merge("lory", segment_length=2),
        "lory, own first": Merge("lory", segment_length=2, first="own"),
    },
}


def routers_of_core(base: type = RouterConfig) -> list[type[RouterConfig]]:
    """Return every router config of the tree: a new one is checked without a line here."""
    below = [kind for sub in base.__subclasses__() for kind in (sub, *routers_of_core(sub))]
    kinds = [kind for kind in below if kind.__module__.startswith("core.") and hasattr(kind, "router_class")]
    return list(dict.fromkeys(kinds))


def with_defaults(kind: type[RouterConfig]) -> dict[str, RouterConfig]:
    needed = {f.name: NEEDED[f.name] for f in fields(kind) if f.default is MISSING}
    return {kind.__name__: kind(**needed)}


def cases() -> list[object]:
    params = []
    for kind in routers_of_core():
        for place, (name, config) in enumerate((VARIANTS.get(kind) or with_defaults(kind)).items()):
            sizes = {"num_experts": 9} if kind is ProductKeys else {}  # E is a square
            for prop in properties(config, **sizes):
                # A compiler takes a second: by default it takes every fourth variant and exports half of these.
                is_export = prop.name.startswith("torch.export")
                is_slow = (prop.name.startswith("torch.") and place % 4) or (is_export and crc32(name.encode()) % 2)
                marks = [pytest.mark.slow] if is_slow else []
                params.append(pytest.param(prop, id=f"{name}: {prop}", marks=marks))
    return params


def test_every_router_is_public():
    kinds = routers_of_core()
    assert len(kinds) == len({kind.__name__ for kind in kinds}) >= 25
    assert [kind for kind in kinds if getattr(core, kind.__name__, None) is not kind] == []


@pytest.mark.parametrize("prop", cases())
def test_gate(prop: Property):
    prop.check()


# Gates with one fault each.


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

    def check_context(self, context: RoutingContext | None) -> None:
        if self.config.fault != "does not ask":
            super().check_context(context)

    def choose(self, tokens: Tokens) -> Choice:
        fault, x_TD = self.config.fault, tokens.x_TD
        x_BSD = x_TD.unflatten(0, (tokens.num_sequences, tokens.length))
        if fault == "sees the batch":
            x_TD = x_TD - x_TD.mean(0)
        elif fault == "sees the sequence":
            x_TD = (x_BSD + x_BSD.sum(1, keepdim=True)).flatten(0, 1)
        elif fault == "sees the next token":
            x_TD = (x_BSD + x_BSD.roll(-1, 1)).flatten(0, 1)
        elif fault == "counts padding in a mean":
            x_TD = (x_BSD + x_BSD.mean(1, keepdim=True)).flatten(0, 1)
        elif fault == "sees the position":
            x_TD = (x_BSD * torch.arange(tokens.length)[:, None]).flatten(0, 1)
        elif fault == "is random in evaluation":
            x_TD = x_TD + 0.1 * torch.randn_like(x_TD)
        elif fault == "has a random state of its own":
            self.count += 1
            x_TD = x_TD * self.count
        elif fault == "keeps a state":
            self.calls += 1
        elif fault == "is not saved":
            x_TD = x_TD * self.own
        elif fault == "asks the first token":
            x_TD = x_TD - 0 * x_TD[0]
        elif fault == "asks the host" and float(x_TD.detach().sum()) > 0:
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
        return Choice(ids_TK, gates_TK, Evidence(scores_TE, logits_TE))

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> object:
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


@contextmanager
def kernel_off_by(factor: float) -> Iterator[None]:
    right = cpu.expert_ffn
    with mock.patch.object(cpu, "expert_ffn", lambda *args, **kwargs: factor * right(*args, **kwargs)):
        yield


def test_a_wrong_kernel_is_found():
    wanted = ("the output is the sum of its pairs", "every backend gives the oracle's output and gradients")
    chosen = [p for p in properties(TokenChoice()) if p.name in wanted]
    assert len(chosen) == 2
    for prop in chosen:
        with kernel_off_by(1.0):
            prop.check()
        with kernel_off_by(1.0001), pytest.raises(AssertionError, match="is off by"):
            prop.check()


def test_check_router_names_each_property_that_fails():
    with pytest.raises(AssertionError) as error:
        check_router(Faulty("sees the batch"))
    lines = str(error.value).splitlines()
    assert "properties of Faulty(fault='sees the batch') do not hold" in lines[0]
    names = [line.strip().split(":")[0] for line in lines[1:]]
    assert "other sequences do not change a sequence's output" in names
    assert "num_params is the sum of numel" not in names


def test_check_router_passes_a_sound_gate_and_leaves_the_random_generator():
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


def test_a_router_that_does_not_fit_is_refused_before_anything_is_checked():
    with pytest.raises(ValueError, match=r"top_k=9 exceeds num_experts=8"):
        properties(TokenChoice(9))


def test_every_property_has_a_name_of_its_own():
    names = [check.name for check in CHECKS]
    assert len(names) == len(set(names)) > 25
