"""SIGKILL at a random moment of every command that writes, and then the same command again."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._soak.outcome import Outcome, generator
from benchmarks._soak.trees import broken, files, unlike
from benchmarks._soak.works import WORKS, Unsound, Work, Workshop, fresh


@dataclass(frozen=True)
class Case:
    """A command, a new folder for it, and what decides about moments and amounts."""

    shop: Workshop
    work: Work
    place: Path
    draw: np.random.Generator

    def start(self, **how: Any) -> Any:
        """Start the command; see ``started``."""
        return self.shop.start(self.work, self.place, **how)

    def moment(self) -> float:
        """Return a moment of the unbroken run, in seconds from its start."""
        return float(self.draw.uniform(0.0, self.shop.seconds[self.work.name]))

    def differs(self) -> str:
        """Return what an unbroken run has left otherwise; "": nothing."""
        return unlike(self.shop[self.work.name], self.place) if self.work.repeats else broken(self.place)

    def finished(self) -> dict[str, bytes]:
        """Return the results of finished pieces of work, which no process may make again."""
        return {name: path.read_bytes() for name, path in files(self.place).items() if path.name == "result.json"}

    def repeated(self) -> str:
        """Repeat the command, and return the fault; "": none."""
        kept = self.finished()
        with self.start() as command:
            fault = command.fault() or self.differs()
        again = self.finished()
        fault = fault or next((f"{name} was done again" for name in kept if again.get(name) != kept[name]), "")
        return fault and f"{fault}; the command said {command.said[-200:]!r}"


Hazard = Callable[[Case], str]
"""Breaks a command off, and returns the fault; "": none."""


def outcome(number: int, what: str, hazard: Hazard, work: Work, shop: Workshop, folder: Path, part: str) -> Outcome:
    """Return what comes of a command in a folder under a hazard, and of the same command again."""
    try:
        shop[work.name]  # so that its folder is there, and its seconds
        case = Case(shop, work, fresh(folder), generator(part, number))
        return Outcome(number, what, hazard(case) or case.repeated())
    except Unsound as error:
        return Outcome(number, what, str(error))


def kill(case: Case) -> str:
    """Kill all processes, or one alone: the second rank if there is one, else the command's own."""
    with case.start() as command:
        command.wait(case.moment())
        group = command.group() if case.work.ranks > 1 else []
        with contextlib.suppress(OSError):  # a process that has ended
            ranks = (p for p in group if b"LOCAL_RANK=1" in Path(f"/proc/{p}/environ").read_bytes())
            command.send(signal.SIGKILL, next(ranks, command.process.pid) if case.draw.integers(2) else None)
        command.wait()
        return command.left() or broken(case.place)


def cases(numbers: Iterator[int], folder: Path) -> Iterator[Outcome]:
    """Yield a case for each number: of the works in turn, each at another moment."""
    shop = Workshop(folder)
    for number in numbers:
        work = WORKS[number % len(WORKS)]
        yield outcome(number, f"{work.name}: killed", kill, work, shop, folder / "case", "kills")
