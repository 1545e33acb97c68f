"""Named checks of the properties that every router and every kind of experts keeps, a user's own as well as ``core``'s.

    from core.testing import check_expert, check_router, properties

    check_router(MyGate(top_k=2))
    check_expert(MyExpert(hidden_dim=12))

or, a line of the report for each property::

    @pytest.mark.parametrize("prop", properties(MyGate(top_k=2)), ids=str)
    def test_my_gate(prop):
        prop.check()

Which checks of a router apply follows from the facts of its config: ``is_causal``, ``depends_on``, ``reads_position``,
``reads_batch_index``, ``has_exact_gradient``, ``moves_statistics``, ``repeats_experts``, ``needs``, ``layer_kind``,
``layer_options``, ``terms``, and its costs.
Everything runs on the CPU, on small sizes, and leaves the global random generator as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..experts import ExpertConfig
from ..routing.router import RouterConfig
from . import batch_mates, compiling, decisions, experts, losses_and_costs, outputs, shared
from .check import Check
from .expert_case import ExpertCase
from .router_case import RouterCase, seeded

CHECKS: list[Check[Any]] = [
    *decisions.CHECKS,
    *outputs.CHECKS,
    *batch_mates.CHECKS,
    *losses_and_costs.CHECKS,
    *shared.CHECKS,
    *compiling.CHECKS,
]


@dataclass(frozen=True)
class Property:
    """One named check of one router, or of one kind of experts.

    Attributes:
        name: the property in words.
        check: function that raises an ``AssertionError`` if the property does not hold.
    """

    name: str
    check: Callable[[], None]

    def __str__(self) -> str:
        return self.name


def properties(
    config: RouterConfig | ExpertConfig, *, num_experts: int = 8, dim: int = 16, seed: int = 0
) -> list[Property]:
    """Return the properties that this config claims, each to be checked by itself.

    Args:
        config: any router or expert config that fits ``num_experts``.
        num_experts: E.
        dim: D of the tokens.
        seed: seed of weights and tokens.

    Raises:
        ValueError: the config does not fit ``num_experts``.
    """
    if isinstance(config, RouterConfig):
        case = RouterCase(config, num_experts, dim, seed)
        case.config()
        return _properties(case, CHECKS)
    config.check(num_experts)
    of_experts = ExpertCase(config, num_experts, dim, seed)
    return _properties(of_experts, experts.CHECKS) + _properties(of_experts, shared.CHECKS)


def check_router(router: RouterConfig, *, num_experts: int = 8, dim: int = 16, seed: int = 0) -> None:
    """Check every property that this router claims. See ``properties``.

    Raises:
        AssertionError: properties do not hold; the message names each, with the values.
    """
    _check_all(router, properties(router, num_experts=num_experts, dim=dim, seed=seed))


def check_expert(expert: ExpertConfig, *, num_experts: int = 4, dim: int = 16, seed: int = 0) -> None:
    """Check every property that this kind of experts claims. See ``properties``.

    Raises:
        AssertionError: properties do not hold; the message names each, with the values.
    """
    _check_all(expert, properties(expert, num_experts=num_experts, dim=dim, seed=seed))


def _check_all(config: RouterConfig | ExpertConfig, claimed: list[Property]) -> None:
    failures = []
    for prop in claimed:
        try:
            prop.check()
        except Exception as error:  # a property that cannot even be run does not hold
            failures.append(f"{prop.name}: {type(error).__name__}: {error}")
    if failures:
        lines = "\n  ".join(failures)
        raise AssertionError(f"{len(failures)} of {len(claimed)} properties of {config} do not hold:\n  {lines}")


def _properties(case: Any, checks: Sequence[Check[Any]]) -> list[Property]:
    return [Property(check.name, partial(_run, case, check.run)) for check in checks if check.applies(case)]


def _run(case: RouterCase | ExpertCase, run: Callable[[Any], None]) -> None:
    with seeded(case.seed):
        run(case)


__all__ = ["CHECKS", "Property", "check_expert", "check_router", "properties"]
