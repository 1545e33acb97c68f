"""The systems of a comparison: the sparse model and its baselines, with their costs."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from apps.equal_cost import routers
from apps.equal_cost.comparison import Baseline
from apps.equal_cost.own_model import OwnModel
from apps.train.cost.flops import Cost, cuda_devices, measure_cost
from apps.train.step.module import SparseModule

TOLERANCE = 0.05
"""Largest relative difference of the replaced blocks at which two systems are called equal."""

SPARSE = "sparse"


@dataclass(frozen=True)
class System:
    """One column of the table.

    Attributes:
        name: "sparse", or the name of the baseline.
        note: description of the system.
        cost: cost measured before training; None for an estimator.
        refused: reason why it is not trained; empty if it is.
        flops_ratio: FLOPs of the whole model over the sparse model's.
        replaced_ratio: FLOPs of the replaced blocks over the sparse model's.
        params_ratio: parameters of the replaced blocks over the sparse model's.
        tunes: True for an estimator whose settings are searched.
        heading: what tables call it; empty: the words of its name.
    """

    name: str
    note: str
    cost: Cost | None = None
    refused: str = ""
    flops_ratio: float | None = None
    replaced_ratio: float | None = None
    params_ratio: float | None = None
    tunes: bool = False
    heading: str = ""

    @property
    def title(self) -> str:
        """Heading of its column."""
        return self.heading or label(self.name)


def label(name: str) -> str:
    """Return a system's name as a heading: "dense_equal_flops" is "dense, equal FLOPs"."""
    if name.startswith(routers.PREFIX):
        return name.removeprefix(routers.PREFIX)
    words = {"flops": "FLOPs", "params": "parameters"}
    text = " ".join(words.get(w, w) for w in name.split("_"))
    return text.replace(" equal ", ", equal ")


def claim(name: str) -> Literal["flops", "params"] | None:
    """Return the cost that a baseline's name claims to be equal by its end, ``equal_flops`` or ``equal_params``."""
    if name.endswith("equal_flops"):
        return "flops"
    return "params" if name.endswith("equal_params") else None


def of_equal_flops(model: Any) -> str:
    """Return the first baseline of a sparse model that has equal FLOPs.

    Raises:
        ValueError: it has none; the message says why.
    """
    baselines = {name: own for name, own in model.comparison.baselines().items() if claim(name) == "flops"}
    found = next((name for name, own in baselines.items() if own.build is not None), None)
    if found is None:
        why = "; ".join(own.note for own in baselines.values()) or "it has no such baseline"
        raise ValueError(f"{type(model.module).__name__} has no dense model of equal FLOPs to compare with: {why}")
    return found


def check_equal(name: str, sparse: Cost, other: Cost) -> str:
    """Return why the baseline ``name``, of cost ``other``, is not as equal as its name claims, or "" where it is."""
    what = claim(name)
    if what is None:
        return ""
    unit = "FLOPs an example" if what == "flops" else "parameters"
    field = "replaced_flops_per_example" if what == "flops" else "replaced_params"
    wanted, given = getattr(sparse, field), getattr(other, field)
    if not wanted or given is None:
        return f"not called equal: the sparse model has no replaced block to measure {unit} of"
    ratio = given / wanted
    if abs(ratio - 1) <= TOLERANCE:
        return ""
    return (
        f"not called equal: its replaced blocks take {given:,.0f} {unit}, the sparse model's {wanted:,.0f}: "
        f"{ratio:.3f} of them, and the rule is within {TOLERANCE:.0%}"
    )


def candidates(
    sparse: Any, router_names: Iterable[str] = (), wanted: Sequence[str] | None = None
) -> dict[str, Baseline]:
    """Return the baselines of ``sparse`` that are ``wanted``, or all, and itself with the routers of overlays.

    Raises:
        ValueError: a wanted baseline is unknown, or two overlays share a name.
    """
    baselines = sparse.comparison.baselines()
    for name in wanted or ():
        if name not in baselines:
            raise ValueError(f"baseline {name!r} is unknown: the module has {', '.join(baselines) or 'none'}")
    chosen = {name: baselines[name] for name in (baselines if wanted is None else wanted)}
    return {**chosen, **routers.variants(sparse.comparison, router_names)}


def find_systems(
    sparse: Any, batch: Any, wanted: Sequence[str] | None = None, router_names: Iterable[str] = ()
) -> list[System]:
    """Return the sparse model and its baselines with their measured costs; those that may not be trained say why.

    Args:
        sparse: untrained ``SparseModule``, or an ``OwnModel``.
        batch: batch of its data.
        wanted, router_names: arguments of ``candidates``.

    Raises:
        ValueError: the module has no MoE layer, no system is left to compare with, or ``candidates`` rejects a name.
    """
    comparison = sparse.comparison
    replaced = list(comparison.moe_block_names)
    if not replaced:
        raise ValueError(f"{type(sparse).__name__} has no MoE layer: compare starts from a sparse config")
    baselines = candidates(sparse, router_names, wanted)
    cost = measure_cost(sparse, batch, replaced)
    own = {"flops_ratio": 1.0, "replaced_ratio": 1.0, "params_ratio": 1.0}
    systems = [System(SPARSE, comparison.note, cost, **own, heading=comparison.heading)]  # type: ignore[arg-type]
    for name, baseline in baselines.items():
        systems.append(measured(name, baseline, batch, cost, replaced, sparse.module.device))
        gc.collect()  # frees the model that was counted
    if all(s.refused for s in systems[1:]):
        reasons = "; ".join(f"{s.name}: {s.refused}" for s in systems[1:]) or "the module has no baselines"
        raise ValueError(f"nothing to compare with: {reasons}")
    return systems


def measured(
    name: str, baseline: Baseline, batch: Any, sparse: Cost, replaced: Sequence[str], device: torch.device
) -> System:
    """Return a baseline with its cost compared with the sparse model's, or with the reason why it is not trained.

    Args:
        name: its name.
        baseline: the baseline.
        batch: batch of the data.
        sparse: cost of the sparse model.
        replaced: names of the sparse model's blocks that the baseline replaces.
        device: device on which its cost is measured.
    """
    is_router = name.startswith(routers.PREFIX)
    if baseline.build is None:
        return System(name, baseline.note, refused=baseline.note or "cannot be built")
    try:
        model: Any = baseline.build()
    except ValueError as error:
        if not is_router:
            raise
        return System(name, baseline.note, refused=str(error))
    if not isinstance(model, SparseModule | OwnModel):
        return System(name, baseline.note, tunes=getattr(model, "tunes", False))
    model.module.to(device)
    if is_router and isinstance(model, SparseModule) and (problem := _trial(model, batch)):
        return System(name, baseline.note, refused=problem)
    try:
        cost = measure_cost(model, batch, replaced if claim(name) else shared(model.module, replaced))
        refused = check_equal(name, sparse, cost)
    except ValueError as error:
        cost, refused = measure_cost(model, batch), f"not called equal: {error}"
    return System(
        name,
        baseline.note,
        cost,
        refused,
        flops_ratio=cost.flops_per_example / sparse.flops_per_example,
        replaced_ratio=_ratio(cost.replaced_flops_per_example, sparse.replaced_flops_per_example),
        params_ratio=_ratio(cost.replaced_params, sparse.replaced_params),
    )


def _trial(model: SparseModule, batch: Any) -> str:
    """Return why ``model`` cannot train on ``batch``, or "": some routers need more in training."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=cuda_devices(model)):
            model.train().task_loss(batch)
    except ValueError as error:
        return str(error)
    return ""


def shared(model: nn.Module, names: Sequence[str]) -> Sequence[str]:
    """Return ``names`` where the model has them all; a baseline of another structure has no replaced blocks."""
    own = {name for name, _ in model.named_modules()}
    return names if own.issuperset(names) else ()


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None
