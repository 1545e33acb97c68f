"""Dense models of solved widths, which a comparison trains beside a sparse one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from apps.training import Baseline, SparseModule
from apps.widths import SolvedWidth, same_width


def dense_baselines(
    widths: Mapping[str, SolvedWidth], build: Callable[[int], Callable[[], Any]], says: str, elsewhere: int
) -> dict[str, Baseline]:
    """A baseline for each width, or a note where there is none or it is another one again.

    Args:
        widths: by the baselines' names.
        build: makes of a width what makes the model, such as ``DenseTwin``; it pickles.
        says: what the model is, with ``{width}`` in it.
        elsewhere: FFN hidden dim of what is not replaced.
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
            found[name] = Baseline(build(width), f"{note}, {elsewhere} elsewhere")
    return found


@dataclass(frozen=True)
class DenseTwin:
    """Makes ``sparse`` anew with dense FFNs of ``width`` in place of its experts. A class and not a closure: it pickles
    into another process."""

    sparse: SparseModule
    width: int

    def __call__(self) -> SparseModule:
        return self.sparse.twin(moe=None, replaced_hidden_dim=self.width)
