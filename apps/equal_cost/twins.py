"""What baselines share: dense models of solved widths, and the search of those that have no learning rate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from apps.equal_cost.comparable import Baseline
from apps.equal_cost.widths import SolvedWidth, same_width
from apps.train.module import SparseModule


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


class Search:
    """The settings that a baseline tries, and the time for them.

    A setting is begun while there is time left, and then finished. What was tried is kept by its name, so that a search
    that was broken off goes on with the next one, and the seconds of all count.

    Args:
        minutes: for all settings of all tasks.
        tried: what an earlier part of the search has found, by the setting's name; see ``tried`` below.
        keep: told ``tried`` after each setting.

    Attributes:
        tried: by the setting's name, its ``quality`` on the validation split and the ``seconds`` that it took.
        total: settings that the whole search has; who searches counts them up.
    """

    def __init__(
        self,
        minutes: float = math.inf,
        tried: Mapping[str, Mapping[str, float]] | None = None,
        keep: Callable[[dict[str, dict[str, float]]], None] = lambda tried: None,
    ) -> None:
        self.minutes, self.keep, self.total = minutes, keep, 0
        self.tried = {name: dict(found) for name, found in (tried or {}).items()}

    @property
    def seconds(self) -> float:
        return sum(found["seconds"] for found in self.tried.values())

    def quality(self, name: str, run: Callable[[], float], until: float = math.inf) -> float | None:
        """Return what ``run()`` finds for the setting of this name, or has found before; None where time is up.

        Args:
            name: of the setting.
            run: tries it.
            until: share of the minutes that may have passed before it is begun.
        """
        if name not in self.tried:
            if self.seconds >= 60 * self.minutes * until:
                return None
            began = time.perf_counter()
            quality = run()
            self.tried[name] = {"quality": quality, "seconds": time.perf_counter() - began}
            self.keep(self.tried)
        return self.tried[name]["quality"]
