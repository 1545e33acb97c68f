"""A dense twin is a sparse model made anew with dense FFNs of equal cost in place of its experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import core
from apps.equal_cost.comparable import Baseline, Comparable
from core.convert import SolvedWidth, same_width, solve_width


@dataclass(frozen=True)
class DenseTwin:
    """Makes ``sparse`` anew with a dense FFN in place of its experts; unlike a closure, it pickles.

    Attributes:
        sparse: ``SparseModule`` with the arguments ``moe`` and ``dense_ffn``.
        ffn: FFN of the blocks that have experts.
        changed: further arguments of the module, by name.
    """

    sparse: Any
    ffn: core.DenseFFN
    changed: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self) -> Any:
        return self.sparse.twin(moe=None, dense_ffn=self.ffn, **self.changed)


def equal_widths(
    prefix: str, dense: core.DenseFFN, dim: int, flops: float, params: float, each: str = ""
) -> dict[str, SolvedWidth]:
    """Return the hidden dims at which ``dense`` costs ``flops`` a token, and at which it has ``params`` parameters.

    Their names are "<prefix>_equal_flops" and "<prefix>_equal_params". ``each`` ends the unit in a message, as " a
    block".
    """

    def at(width: int) -> core.DenseFFN:
        return dataclasses.replace(dense, hidden_dim=width)

    return {
        f"{prefix}_equal_flops": solve_width(lambda width: at(width).flops_per_token(dim), flops, f"flops{each}"),
        f"{prefix}_equal_params": solve_width(lambda width: at(width).num_params(dim), params, f"params{each}"),
    }


def dense_twins(sparse: Comparable, dense: core.DenseFFN) -> dict[str, Baseline]:
    """Return dense models of equal active FLOPs and of equal parameters.

    The other blocks of ``sparse`` have the FFN ``dense``; only the FFNs in place of experts are wider, all alike.
    """
    layers = sparse.routed_layers()
    if layers is None:
        return {}
    widths = equal_widths("dense", dense, layers.dim, layers.flops_per_token(), layers.num_params())
    says = f"FFN hidden dim {{width}} in place of experts, {dense.hidden(layers.dim)} elsewhere"
    return baselines_of(widths, lambda width: DenseTwin(sparse, dataclasses.replace(dense, hidden_dim=width)), says)


def baselines_of(
    widths: Mapping[str, SolvedWidth], build: Callable[[int], Callable[[], Any]], says: str
) -> dict[str, Baseline]:
    """Return a baseline for each width, or a note where there is none or it coincides with another.

    Args:
        widths: solved widths by the baselines' names.
        build: returns what makes the model of a width, such as a ``DenseTwin``; its result pickles.
        says: description of the model, with ``{width}`` in it.
    """
    baselines: dict[str, Baseline] = {}
    for name, (width, problem) in widths.items():
        twin = next((n for n, b in baselines.items() if b.build and same_width(width, widths[n].width)), None)
        note = says.format(width=width)
        if problem:
            baselines[name] = Baseline(None, problem)
        elif twin is not None:
            baselines[name] = Baseline(None, f"coincides with {twin}: {note}, there {widths[twin].width}")
        else:
            baselines[name] = Baseline(build(width), note)
    return baselines
