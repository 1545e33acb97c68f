"""One training as a unit of work: its name, its folder, and its result in a JSON file there."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import seed_everything

from apps.base.files import read_json, write_json
from apps.base.quiet import quiet
from apps.train.step.finite import NonFiniteError

RESULT = "result.json"


@dataclass(frozen=True)
class Unit:
    """One training.

    Attributes:
        system: name of the system.
        rate: learning rate; None: it has none, or one without a name.
        seed: seed of the initial weights, the data order and everything else that is random.
    """

    system: str
    rate: float | None
    seed: int

    ROOM: ClassVar[str] = "units"
    """Folder of all units of a piece of work, within its own."""
    KEY: ClassVar[str] = "unit"
    """Where a result has the unit's own values."""

    @property
    def name(self) -> str:
        """Return its name, which is its folder below ``ROOM``."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """Return what bars and lines call it."""
        return self.name

    @property
    def weight(self) -> float:
        """Return how much work it is relative to others."""
        return 1.0

    @property
    def is_search(self) -> bool:
        """Return whether it only helps to choose: one that diverges is a result then, and no error."""
        raise NotImplementedError

    def named(self, kind: str, more: str = "") -> str:
        """Return a name of the system, what kind of training it is, the learning rate, ``more`` and the seed."""
        rate = "" if self.rate is None else f"-lr{self.rate:g}"
        return f"{self.system}/{kind}{rate}{more}-seed{self.seed}"

    def folder(self, output: Path) -> Path:
        return output / self.ROOM / self.name

    def read(self, output: Path) -> Any:
        """Return the result, plain values by name; None if the unit is not finished."""
        return read_json(self.folder(output) / RESULT)

    def record(
        self, output: Path, work: Callable[[], Mapping[str, Any]], clock: Callable[[], float] = time.time
    ) -> dict[str, Any]:
        """Do ``work`` with the unit's seed, write its result with the seconds that it took, and return it.

        Raises:
            NonFiniteError: a unit that is not a search diverged.
        """
        began, cpu = clock(), time.process_time()
        with quiet(own_notes=False):
            seed_everything(self.seed, verbose=False)
            try:
                result = work()
            except NonFiniteError as error:
                if not self.is_search:
                    raise NonFiniteError(f"{self.name}: {error}") from None
                result = {"quality": None, "diverged": str(error)}
        seconds = {"wall_seconds": clock() - began, "cpu_seconds": time.process_time() - cpu}
        result = {self.KEY: {**dataclasses.asdict(self), "name": self.name}, **result, **seconds}
        write_json(self.folder(output) / RESULT, result)
        return result
