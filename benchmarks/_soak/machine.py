"""Every command that writes on a machine that has run short of something, and then the same command again."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks._soak.kills import repeated
from benchmarks._soak.outcome import Outcome, generator
from benchmarks._soak.trees import broken, files, unlike
from benchmarks._soak.works import WORKS, Unsound, Work, Workshop

WEIGHT = 3
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGWINCH, signal.SIGCONT, signal.SIGHUP, signal.SIGUSR1)


@dataclass(frozen=True)
class Case:
    """A command, a new folder for it, what an unbroken run leaves, and what decides about moments and amounts."""

    shop: Workshop
    work: Work
    place: Path
    whole: Path
    draw: np.random.Generator

    def moment(self) -> float:
        """Return a moment of the unbroken run, in seconds from its start."""
        return float(self.draw.uniform(0.0, self.shop.seconds[self.work.name]))

    def limited(self, **limits: int) -> str:
        """Return the fault of the command under limits: it succeeds, or says in a line why not."""
        with self.shop.start(self.work, self.place, limits=limits) as command:
            return command.fault() or broken(self.place)


def full_disk(case: Case) -> str:
    """The disk is full after a part of what the command writes."""
    size = sum(path.stat().st_size for path in files(case.whole).values())
    return on_disk(case, f"size={int(case.draw.uniform(0.05, 1.2) * size) + 65536}", "size=4g")


def read_only(case: Case) -> str:
    """Nothing can be written."""
    return on_disk(case, "ro", "rw")


def on_disk(case: Case, options: str, later: str) -> str:
    """Run the command on a disk of such options, which gets other ones later."""
    subprocess.run(["mount", "-o", f"remount,{options}", case.place.parent], check=True)
    fault = case.limited()
    subprocess.run(["mount", "-o", f"remount,{later}", case.place.parent], check=True)
    return fault


def full_file(case: Case) -> str:
    """No file may grow beyond a size."""
    most = max(path.stat().st_size for path in files(case.whole).values())
    return case.limited(RLIMIT_FSIZE=int(case.draw.uniform(0.0, 1.0) * most) + 4096)  # the log has room


def vanishing(case: Case) -> str:
    """The folder is removed while the command runs."""
    with case.shop.start(case.work, case.place) as command:
        command.wait(case.moment())
        shutil.rmtree(case.place, ignore_errors=True)
        fault = command.fault() or broken(case.place)
    case.shop.place(case.place)
    return fault


def open_files(case: Case) -> str:
    """At most 256 files may be open."""
    return case.limited(RLIMIT_NOFILE=256) or unlike(case.whole, case.place) * case.work.repeats


def memory(case: Case) -> str:
    """Memory beyond what was there at the start is limited."""
    return case.limited(RLIMIT_AS=int(case.draw.uniform(0.0, 1.0) * 2**29))


def two(case: Case) -> str:
    """Two processes do the same in the same folder."""
    with case.shop.start(case.work, case.place) as first:
        first.wait(case.moment())
        with case.shop.start(case.work, case.place) as second:
            fault = first.fault() or second.fault() or broken(case.place)
            return fault or ("both gave up" if first.wait() and second.wait() else "")


def clock(case: Case) -> str:
    """The clock is set back by a day."""
    with case.shop.start(case.work, case.place, SOAK_CLOCK=str(case.moment())) as command:
        return command.fault((0,)) or unlike(case.whole, case.place) * case.work.repeats


def signals(case: Case) -> str:
    """A storm of signals."""
    with case.shop.start(case.work, case.place) as command:
        command.wait(case.moment())
        for number in case.draw.choice(SIGNALS, 20):
            command.send(int(number))
            command.wait(float(case.draw.exponential(0.02)))
        ends = (0, 1, 2, 130, 143, *(-number for number in SIGNALS))
        return command.fault(ends) or broken(case.place)


HAZARDS: Sequence[Callable[[Case], str]] = (
    full_disk, full_file, read_only, vanishing, open_files, two, clock, signals, memory,
)  # fmt: skip


def cases(numbers: Iterator[int], folder: Path) -> Iterator[Outcome]:
    """Yield a case for each number: the hazards in turn, each for another command."""
    shop, disk = Workshop(folder), folder / "disk"
    for number in numbers:
        hazard, draw = HAZARDS[number % len(HAZARDS)], generator("machine", number)
        work, name = WORKS[draw.integers(len(WORKS))], hazard.__name__.replace("_", " ")
        disk.mkdir(exist_ok=True)
        with contextlib.ExitStack() as stack:
            if hazard in (full_disk, read_only):
                if subprocess.run(["mount", "-t", "tmpfs", "none", disk], capture_output=True).returncode:
                    yield Outcome(number, f"{name}: only root can mount a disk for it", count=0)
                    continue
                stack.callback(subprocess.run, ["umount", "-l", disk], check=True)
            try:
                case = Case(shop, work, shop.place(disk / "case"), shop.whole(work.name), draw)
                fault = hazard(case) or repeated(shop, work, case.place, case.whole)
            except Unsound as error:
                fault = str(error)
            yield Outcome(number, f"{name}: {work.name}", fault)
