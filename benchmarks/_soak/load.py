"""Load: services that stay up from case to case, under good and bad requests, signals, slow and idle clients."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import chats
import numpy as np
from shown_runs import RUNS

import apps
from apps.base.quiet import quiet
from apps.serve.service.command import service_of
from benchmarks._soak.outcome import Outcome
from benchmarks.service import _HEAD, CONNECTIONS, Load, Server, _send, load, mixed, serving

GROWTH, FIRST = 1.02, 1000
"""Most memory of a service over that after its first so many requests."""
IDLE = 10_000
CLOSING = _HEAD + "Connection: close\r\n"


@dataclass
class Kept:
    """A service of a run that stays up, with its requests, their answers, and what it has held and taken so far."""

    run: str
    server: Server
    kinds: list[tuple[bytes, int, Any]]
    sent: Load = field(default_factory=Load)
    memory: int = 0

    @property
    def good(self) -> bytes:
        """A good request for one input, whose connection is closed after its answer."""
        request = next(request for request, status, outputs in self.kinds if status == 200 and len(outputs) == 1)
        return request.replace(_HEAD.encode(), CLOSING.encode())


def requests(kept: Kept, count: int) -> str:
    """Send requests from 64 connections: answers are right, and memory is flat."""
    kept.sent.wrong.clear()
    asyncio.run(_send(kept.server, kept.kinds, count, None, CONNECTIONS, kept.sent))
    held = kept.server.memory
    if not kept.memory and kept.sent.num_answered >= FIRST:
        kept.memory = held
    grown = f"memory grew from {kept.memory:,} to {held:,}" if kept.memory and held > GROWTH * kept.memory else ""
    return "; ".join([*kept.sent.wrong[:3], grown]).strip("; ")


async def raw(port: int, request: bytes, ends: bool = False) -> bytes:
    """Send bytes on a connection of their own, which may end there, and return all that comes until it is closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.closing(writer), contextlib.suppress(ConnectionError):
        writer.write(request)
        if ends:
            writer.write_eof()
        return await asyncio.wait_for(reader.read(), 120)
    return b""


def status_of(answer: bytes) -> int:
    return int(answer[9:12] or 0)


def crowd(kept: Kept) -> str:
    """Ask a service that answers 4 requests at once from 256 connections: the others hear when to come again."""

    async def ask() -> list[bytes]:
        return await asyncio.gather(*(raw(kept.server.port, kept.good) for _ in range(256)))

    answers = asyncio.run(ask())
    found = Counter(map(status_of, answers))
    mute = sum(status_of(answer) == 503 and b"retry-after: " not in answer.lower() for answer in answers)
    is_right = {*found} == {200, 503} and not mute
    return "" if is_right else f"statuses {dict(found)}, {mute} without Retry-After"


def starving(kept: Kept) -> str:
    """Hold idle, slow and half-closed connections, 10,000 of them one after the other, and ask meanwhile."""
    most = min(IDLE, resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 500)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most + 500, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    async def hold() -> list[tuple[int, float]]:
        writers, answers = [], []
        for i in range(most):
            with contextlib.suppress(OSError):  # the service closes those that wait too long
                _, writer = await asyncio.open_connection("127.0.0.1", kept.server.port)
                writers.append(writer)
                writer.write([b"", b"POST /pre", kept.good[:-5]][i % 3])
                if i % 5 == 0:
                    writer.write_eof()
            if i % (most // 20) == 0:
                began, status = time.perf_counter(), 503
                while status == 503 and time.perf_counter() < began + 10:  # as Retry-After asks
                    status = status_of(await raw(kept.server.port, kept.good))
                    await asyncio.sleep(status == 503)
                answers.append((status, time.perf_counter() - began))
        for writer in writers:
            writer.close()
        return answers

    answers = asyncio.run(hold())
    wrong = [(status, f"{seconds:.1f} s") for status, seconds in answers if status != 200 or seconds > 10]
    return f"{len(wrong)} of {len(answers)} good clients starve: {wrong[:5]}" if wrong else ""


def cut(kept: Kept) -> str:
    """Cut 20 streams of a service that answers 4 requests at once, one after the other: each frees its place."""
    request = kept.good.replace(b"/predict", b"/stream")

    async def leave() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", kept.server.port)
        writer.write(request)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
        writer.transport.abort()
        await asyncio.sleep(0.1)
        return status_of(head)

    began, statuses = time.perf_counter(), {asyncio.run(leave()) for _ in range(20)}
    after = status_of(asyncio.run(raw(kept.server.port, kept.good)))
    is_free = statuses == {200} and after == 200
    return "" if is_free else f"{statuses}, then {after} in {time.perf_counter() - began:.0f} s"


def ends(kept: Kept) -> str:
    """Send SIGTERM to another service in the middle of a load: what was taken is answered."""
    result = load(kept.run, 1000, signal.SIGTERM)
    told = f"serve: ended; answered requests: {result.num_answered:,}"
    is_right = not result.wrong and result.exit_code == 0 and result.last_line == told
    return "" if is_right else f"{result.wrong[:3]}, exit code {result.exit_code}, {result.last_line!r}"


Trial = tuple[str, Callable[[Kept], str], int, Sequence[str]]
"""The run that is served, what is done to its service, how many cases that is, and options of the command."""

MAIN: Trial = ("digits", functools.partial(requests, count=1000), 1000, ())
SPECIAL: dict[str, Trial] = {
    "crowd": ("digits", crowd, 1, ("--max_requests", "4")),
    "starving": ("digits", starving, 1, ()),
    "cut streams": ("hub", cut, 1, ("--max_requests", "4")),
    "SIGTERM": ("digits", ends, 1000, ()),
}
OTHERS: dict[str, Trial] = {
    name: (name, functools.partial(requests, count=100), 100, ()) for name in RUNS if name != "digits"
}


@functools.cache
def served(name: str, folder: Path) -> str:
    """Return a run of an app with random weights, or a folder of transformers."""
    (folder / name).mkdir()
    with quiet(own_notes=False):
        return str(chats.write(folder / name) / "model" if name == "hub" else RUNS[name](folder / name))


def cases(numbers: Iterator[int], folder: Path) -> Iterator[Outcome]:
    """Yield in turn a thousand requests at a classifier, a special case, and a hundred requests at another app."""
    services = dict[str, Kept]()
    with contextlib.ExitStack() as stack:
        for number in numbers:
            trials = [{"digits": MAIN}, SPECIAL, OTHERS][number % 3]
            name = list(trials)[number // 3 % len(trials)]
            app, trial, count, options = trials[name]
            if name not in services:
                run = served(app, folder)
                model = apps.load(run)
                server = stack.enter_context(serving(run, *options))
                services[name] = Kept(run, server, mixed(service_of(model)(model)))
            yield Outcome(number, f"{name}: of {app}", trial(services[name]), count)
            if trials is not SPECIAL and (sent := services[name].sent).num_answered % 10_000 == 0:
                p50, p99 = 1000 * np.quantile(sent.seconds, [0.5, 0.99])
                held = services[name].server.memory >> 20
                told = f"{sent.num_answered:,} requests, p50 {p50:.0f} ms, p99 {p99:.0f} ms, {held} MiB"
                yield Outcome(number, f"{name}: {told}", count=0)
