"""Commands of moesaic in process groups of their own. Each is a fork of a process that has imported all it needs.

So a command starts in milliseconds, and a kill strikes its work and not the imports.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from toy_dataset import CONTENT, toy

import apps
from apps.cli import main
from apps.cli.errors import failed
from apps.porting import save_pretrained

LONGEST = 900.0
"""Seconds that a command may take before it counts as hanging."""

PRELOADED = ("compare", "convert", "serve.export", "verdict")


@dataclass(frozen=True)
class Command:
    """A command that runs.

    Attributes:
        process: leads a process group.
        log: file of its stdout and stderr.
    """

    process: Any
    log: Path

    @property
    def said(self) -> str:
        """Its stdout and stderr."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait(self, seconds: float = LONGEST) -> int | None:
        """Return its exit code, negative for a signal; None if it still runs after so many seconds."""
        self.process.join(seconds)
        return self.process.exitcode

    def group(self) -> list[int]:
        """Return the processes of its group that run."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has ended
                state, _, group = path.read_text().rpartition(")")[2].split()[:3]
                found += [int(path.parent.name)] if int(group) == self.process.pid and state != "Z" else []
        return found

    def send(self, number: int, process: int | None = None) -> None:
        """Send a signal to a process; None: to the whole group."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number) if process else os.killpg(self.process.pid, number)

    def left(self, patience: float = 120.0) -> str:
        """Return the fault that processes are left after its end; "": none is."""
        end = time.monotonic() + patience
        while (group := self.group()) and time.monotonic() < end:
            time.sleep(0.05)
        return f"{len(group)} processes were left" if group else ""

    def fault(self, allowed: Sequence[int] = (0, 1, 2)) -> str:
        """Wait for its end, and return what is wrong with it; "": it succeeded, or a line says why it did not."""
        code, said = self.wait(), self.said
        if code is None:
            return f"it hangs after {LONGEST:g} s: {said[-300:]!r}"
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        if (
            re.search("Traceback|--traceback shows", said)
            or code not in allowed
            or (code in (1, 2) and len(errors) != 1)
        ):
            return f"exit code {code}, {len(errors)} lines of errors: {said[-600:]!r}"
        return self.left()


@contextlib.contextmanager
def started(
    words: Sequence[str], place: Path, log: Path, limits: Mapping[str, int] | None = None, **variables: str
) -> Iterator[Command]:
    """Run ``moesaic WORDS``, or one of ``FUNCTIONS``, in a folder; after the block nothing of it runs.

    Args:
        words: of the command.
        place: the folder.
        log: file of its stdout and stderr.
        limits: soft limits of its resources, such as ``RLIMIT_FSIZE``; ``RLIMIT_AS`` counts from what it has.
        variables: of its environment; SOAK_CLOCK: the seconds after which its clock is set back by a day.
    """
    context = multiprocessing.get_context("forkserver")  # it has no threads, and starts once
    context.set_forkserver_preload([__name__, "apps.cli.train", *(f"apps.{name}.command" for name in PRELOADED)])
    command = Command(context.Process(target=_become, args=(list(words), place, log, limits or {}, variables)), log)
    command.process.start()
    try:
        yield command
    finally:
        command.send(signal.SIGKILL)


def _become(words: list[str], place: Path, log: Path, limits: Mapping[str, int], variables: Mapping[str, str]) -> None:
    """Run a command in this process, which is new."""
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2)
    if not place.is_dir():
        sys.exit("error: the folder has vanished before the command began")
    os.chdir(place)
    os.environ.update(variables)
    sys.argv = ["moesaic", *words]
    sys.modules["__main__"].__spec__ = importlib.util.find_spec("apps.cli.__main__")  # what Lightning starts for a rank
    if "SOAK_CLOCK" in variables:
        now, back = time.time, time.time() + float(variables["SOAK_CLOCK"])
        time.time = lambda: now() - 86400.0 * (now() > back)
    for name, most in limits.items():
        kind = getattr(resource, name)
        if name == "RLIMIT_AS":
            most += int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))
    code = 1
    try:
        code = FUNCTIONS[words[0]](*words[1:]) or 0 if words[0] in FUNCTIONS else main(words)
    except Exception as error:  # of a function
        code = failed(error, show_traceback=False)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def _publish(run: str, folder: str) -> None:
    """Write a run's model in our own layout, as it is uploaded."""
    apps.load(run).save_pretrained(folder)


def _port(run: str, folder: str) -> None:
    """Write a run's model as transformers reads it."""
    save_pretrained(apps.load(run).model, folder)


def _slowly(folder: Path) -> None:
    """Fetch a dataset in half a second."""
    for _ in range(50):
        with open(folder / "toy.csv", "ab") as file:
            file.write(CONTENT)
        time.sleep(0.01)


def _prepare(folder: str) -> int:
    """Fetch a dataset of one file, which is registered here."""
    toy(SimpleNamespace(installed=lambda: None, fetch=_slowly))
    return main(["data", "prepare", "toy", "--cache_dir", folder])


FUNCTIONS = {"publish": _publish, "port": _port, "prepare": _prepare}
"""Functions of Python that write, and are no command of their own."""
