"""Every command that writes on a machine that has run short of something, and then the same command again."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from benchmarks._soak.kills import Case, Hazard, outcome
from benchmarks._soak.outcome import Outcome, generator
from benchmarks._soak.trees import broken, files
from benchmarks._soak.works import WORKS, Workshop, fresh

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGWINCH, signal.SIGCONT, signal.SIGHUP, signal.SIGUSR1)


def sizes(case: Case) -> list[int]:
    """Return the bytes of each file that an unbroken run leaves."""
    return [path.stat().st_size for path in files(case.shop[case.work.name]).values()]


def limited(case: Case, **limits: int) -> str:
    """Return the fault of the command under limits: it succeeds, or says in a line why not."""
    with case.start(limits=limits) as command:
        return command.fault() or broken(case.place)


def full_disk(case: Case) -> str:
    """The disk is full after a part of what the command writes."""
    return on_disk(case, f"size={int(case.draw.uniform(0.05, 1.2) * sum(sizes(case))) + 65536}", "size=4g")


def read_only(case: Case) -> str:
    """Nothing can be written."""
    return on_disk(case, "ro", "rw")


def on_disk(case: Case, options: str, later: str) -> str:
    """Run the command on a disk of such options, which gets other ones later."""
    subprocess.run(["mount", "-o", f"remount,{options}", case.place.parent], check=True)
    fault = limited(case)
    subprocess.run(["mount", "-o", f"remount,{later}", case.place.parent], check=True)
    return fault


def full_file(case: Case) -> str:
    """No file may grow beyond a size."""
    return limited(case, RLIMIT_FSIZE=int(case.draw.uniform(0.0, 1.0) * max(sizes(case))) + 4096)  # the log has room


def vanishing(case: Case) -> str:
    """The folder is removed while the command runs."""
    with case.start() as command:
        command.wait(case.moment())
        shutil.rmtree(case.place, ignore_errors=True)
        fault = command.fault() or broken(case.place)
    fresh(case.place)
    return fault


def open_files(case: Case) -> str:
    """At most 256 files may be open."""
    return limited(case, RLIMIT_NOFILE=256) or case.differs()


def memory(case: Case) -> str:
    """Memory beyond what was there at the start is limited."""
    return limited(case, RLIMIT_AS=int(case.draw.uniform(0.0, 1.0) * 2**29))


def two(case: Case) -> str:
    """Two processes do the same in the same folder."""
    with case.start() as first:
        first.wait(case.moment())
        with case.start() as second:
            fault = first.fault() or second.fault() or broken(case.place)
            return fault or ("both gave up" if first.wait() and second.wait() else "")


def clock(case: Case) -> str:
    """The clock is set back by a day."""
    with case.start(SOAK_CLOCK=str(case.moment())) as command:
        return command.fault((0,)) or case.differs()


def signals(case: Case) -> str:
    """A storm of signals."""
    with case.start() as command:
        command.wait(case.moment())
        for number in case.draw.choice(SIGNALS, 20):
            command.send(int(number))
            command.wait(float(case.draw.exponential(0.02)))
        return command.fault((0, 1, 2, 130, 143, *(-number for number in SIGNALS))) or broken(case.place)


HAZARDS: tuple[Hazard, ...] = (
    full_disk, full_file, read_only, vanishing, open_files, two, clock, signals, memory,
)  # fmt: skip


def cases(numbers: Iterator[int], folder: Path) -> Iterator[Outcome]:
    """Yield a case for each number: the hazards in turn, each for another command."""
    shop, disk = Workshop(folder), folder / "disk"
    disk.mkdir(exist_ok=True)
    for number in numbers:
        hazard, work = HAZARDS[number % len(HAZARDS)], WORKS[generator("works", number).integers(len(WORKS))]
        name = hazard.__name__.replace("_", " ")
        with contextlib.ExitStack() as stack:
            if hazard in (full_disk, read_only):
                if subprocess.run(["mount", "-t", "tmpfs", "none", disk], capture_output=True).returncode:
                    yield Outcome(number, f"{name}: only root can mount a disk for it", count=0)
                    continue
                stack.callback(subprocess.run, ["umount", "-l", disk], check=True)
            yield outcome(number, f"{name}: {work.name}", hazard, work, shop, disk / "case", "machine")
