"""SIGKILL at a random moment of every command that writes, and then the same command again."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks._soak.outcome import Outcome, generator
from benchmarks._soak.process import Command
from benchmarks._soak.trees import broken, files, unlike
from benchmarks._soak.works import WORKS, Unsound, Work, Workshop

WEIGHT = 3


def cases(numbers: Iterator[int], folder: Path) -> Iterator[Outcome]:
    """Yield a case for each number: of the works in turn, each at another moment."""
    shop = Workshop(folder)
    for number in numbers:
        work, place = WORKS[number % len(WORKS)], folder / "case"
        draw = generator("kills", number)
        share, alone = draw.uniform(), bool(draw.integers(2))
        what = f"{work.name}: {'a process' if alone else 'all processes'} killed after {share:.3f} of its time"
        try:
            whole = shop.whole(work.name)
            moment = share * shop.seconds[work.name]
            yield Outcome(number, what, killed(shop, work, shop.place(place), whole, moment, alone))
        except Unsound as error:
            yield Outcome(number, what, str(error))


def killed(shop: Workshop, work: Work, place: Path, whole: Path, moment: float, alone: bool) -> str:
    """Return the fault of a command that is killed and repeated; "": none."""
    with shop.start(work, place) as command:
        command.wait(moment)
        kept = finished(place)
        command.send(signal.SIGKILL, victim(command, work) if alone else None)
        command.wait()
        fault = command.left() or broken(place)
    return fault or repeated(shop, work, place, whole, kept)


def repeated(shop: Workshop, work: Work, place: Path, whole: Path, kept: Mapping[str, bytes] | None = None) -> str:
    """Repeat a command that was broken off, and return what differs from an unbroken run; "": nothing.

    Args:
        shop, work, place: what is repeated where.
        whole: folder of the unbroken run.
        kept: results that were finished before, which no process may make again.
    """
    with shop.start(work, place) as command:
        fault = command.fault() or (unlike(whole, place) if work.repeats else broken(place))
    again = finished(place)
    fault = fault or next((f"{name} was done again" for name in kept or {} if again.get(name) != kept[name]), "")
    return fault and f"{fault}; the command said {command.said[-200:]!r}"


def victim(command: Command, work: Work) -> int:
    """Return the process to be killed alone: the second rank if there is one, else the command's own."""
    others = [process for process in command.group() if process != command.process.pid] if work.ranks > 1 else []
    ranks = (p for p in others if b"LOCAL_RANK=1" in Path(f"/proc/{p}/environ").read_bytes())
    return next(ranks, command.process.pid)


def finished(place: Path) -> dict[str, bytes]:
    """Return the results of finished pieces of work."""
    return {name: path.read_bytes() for name, path in files(place).items() if path.name == "result.json"}
