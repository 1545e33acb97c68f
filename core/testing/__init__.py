"""Named checks of the properties that every router keeps, for users' own gates and for those of ``core``.

    from core.testing import check_router, properties

    check_router(MyGate(top_k=2))

or, a line of the report for each property::

    @pytest.mark.parametrize("prop", properties(MyGate(top_k=2)), ids=str)
    def test_my_gate(prop):
        prop.check()

Which checks apply follows from the facts of its config: ``is_causal``, ``depends_on``, ``reads_position``,
``reads_batch_index``, ``has_exact_gradient``, ``needs``, ``layer_kind``, ``layer_options``, ``terms``, and its costs.
Everything runs on the CPU, on small sizes, and leaves the global random generator as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ..routing.router import RouterConfig
from . import batch_mates, compiling, decisions, losses_and_costs, outputs, saving
from .router_case import RouterCase, seeded

CHECKS = [
    *decisions.CHECKS,
    *outputs.CHECKS,
    *batch_mates.CHECKS,
    *losses_and_costs.CHECKS,
    *saving.CHECKS,
    *compiling.CHECKS,
]


@dataclass(frozen=True)
class Property:
    """One named check of one router.

    Attributes:
        name: the property in words.
        check: function that raises an ``AssertionError`` where the property does not hold.
    """

    name: str
    check: Callable[[], None]

    def __str__(self) -> str:
        return self.name


def properties(router: RouterConfig, *, num_experts: int = 8, dim: int = 16, seed: int = 0) -> list[Property]:
    """Return the properties that this router claims, each to be checked by itself.

    Args:
        router: any router config that fits ``num_experts``.
        num_experts: E.
        dim: D of the tokens.
        seed: seed of weights and tokens.

    Raises:
        ValueError: the router does not fit ``num_experts``.
    """
    case = RouterCase(router, num_experts, dim, seed)
    case.config()
    return [Property(check.name, partial(_run, case, check.run)) for check in CHECKS if check.applies(case)]


def check_router(router: RouterConfig, *, num_experts: int = 8, dim: int = 16, seed: int = 0) -> None:
    """Check every property that this router claims. See ``properties``.

    Raises:
        AssertionError: properties do not hold; the message names each, with the values.
    """
    claimed = properties(router, num_experts=num_experts, dim=dim, seed=seed)
    failures = []
    for prop in claimed:
        try:
            prop.check()
        except Exception as error:  # a property that cannot even be run does not hold
            failures.append(f"{prop.name}: {type(error).__name__}: {error}")
    if failures:
        lines = "\n  ".join(failures)
        raise AssertionError(f"{len(failures)} of {len(claimed)} properties of {router} do not hold:\n  {lines}")


def _run(case: RouterCase, run: Callable[[RouterCase], None]) -> None:
    with seeded(case.seed):
        run(case)


__all__ = ["CHECKS", "Property", "check_router", "properties"]
