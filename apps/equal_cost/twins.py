"""Dense twins: the model that has experts anew, with dense FFNs of equal cost in their place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import core
from apps.equal_cost.comparable import Baseline, Comparable
from apps.equal_cost.widths import SolvedWidth, equal_widths, same_width


@dataclass(frozen=True)
class DenseTwin:
    """Makes ``sparse`` anew with a dense FFN in place of its experts. A class and no closure: it pickles into another
    process.

    Attributes:
        sparse: a ``SparseModule`` with the arguments ``moe`` and ``dense_ffn``.
        ffn: of the blocks that have experts.
        changed: further arguments of the module, by name.
    """

    sparse: Any
    ffn: core.DenseFFN
    changed: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self) -> Any:
        return self.sparse.twin(moe=None, dense_ffn=self.ffn, **self.changed)


def dense_twins(sparse: Comparable, dense: core.DenseFFN) -> dict[str, Baseline]:
    """Return dense models of equal active FLOPs and of equal parameters; only the FFNs in place of experts are wider.

    Args:
        sparse: the module.
        dense: the FFN of its other blocks.
    """
    layers = sparse.routed_layers()
    if layers is None:
        return {}
    assert isinstance(layers.config, core.MoEConfig)
    widths = equal_widths("dense", dense, layers.dim, layers.flops_per_token(), layers.config.num_params(layers.dim))
    says = f"FFN hidden dim {{width}} in place of experts, {dense.hidden(layers.dim)} elsewhere"
    return baselines_of(widths, lambda width: DenseTwin(sparse, dataclasses.replace(dense, hidden_dim=width)), says)


def baselines_of(
    widths: Mapping[str, SolvedWidth], build: Callable[[int], Callable[[], Any]], says: str
) -> dict[str, Baseline]:
    """Return a baseline for each width, or a note where there is none or it is another one again.

    Args:
        widths: by the baselines' names.
        build: makes of a width what makes the model, such as ``DenseTwin``; it pickles.
        says: what the model is, with ``{width}`` in it.
    """
    found: dict[str, Baseline] = {}
    for name, (width, problem) in widths.items():
        twin = next((n for n, b in found.items() if b.build and same_width(width, widths[n].width)), None)
        note = says.format(width=width)
        if problem:
            found[name] = Baseline(None, problem)
        elif twin is not None:
            found[name] = Baseline(None, f"coincides with {twin}: {note}, there {widths[twin].width}")
        else:
            found[name] = Baseline(build(width), note)
    return found
