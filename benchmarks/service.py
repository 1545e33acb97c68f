"""Print what a service of ``moesaic serve`` gives: its throughput beside the bare model's, and how it takes a load.

    python -m benchmarks.service RUN [RUN ...] [--rounds 5] [--seconds 3] [--requests 10000] [--json FILE]

Throughput: the bare model answers batches of 32 inputs that have been read, and batches that it reads first (images are
decoded and scaled); the service gets requests of 32 inputs from 4 connections, and of one input from 64. Each round
does one after the other. The processor's time for an input
stands beside the clock's, for a busy machine stretches the latter: client and service share its cores.

Load: good requests and bad ones, mixed, from 64 connections. Answers are compared with the model's own. Three services
get it: one answers all, one gets SIGTERM in the middle, one SIGKILL.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apps
from apps.base.machine import machine_line
from apps.serve.service.command import service_of
from apps.task import Service

BATCH, CONNECTIONS = 32, 64
_HEAD = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


# ---- a service, and a connection to it


@dataclass(frozen=True)
class Server:
    """A service that runs in a process of its own."""

    process: subprocess.Popen[str]
    port: int

    @property
    def memory(self) -> int:
        """Bytes of memory that the process holds."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    @property
    def processor_seconds(self) -> float:
        """Seconds that the process has computed."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def serving(run: str, *options: str) -> Iterator[Server]:
    """Serve a run on a free port inside; afterwards the process is gone."""
    command = [sys.executable, "-m", "apps.cli", "serve", "--ckpt_path", run, "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            yield Server(process, int(first.rpartition(":")[2]))
        finally:
            process.kill()


class Connection:
    """A connection that is kept, on which one request after the other is sent."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Send a request, and return status and body of its answer.

        Raises:
            OSError, EOFError: the service is not there, or the connection was closed before a whole answer.
        """
        try:
            if self._streams is None:
                self._streams = await asyncio.open_connection("127.0.0.1", self._port)
            reader, writer = self._streams
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
            body = await reader.readexactly(length)
        except (OSError, EOFError):
            self.close()
            raise
        if b"connection: close" in head:
            self.close()
        return int(head.split()[1]), body

    def close(self) -> None:
        """Close it; the next request opens another one."""
        if self._streams is not None:
            self._streams[1].close()
        self._streams = None


def request_of(body: bytes, head: str = _HEAD) -> bytes:
    """Return the bytes of a request."""
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def request_for(items: Sequence[Any]) -> bytes:
    """Return the bytes of a request for some inputs."""
    return request_of(json.dumps({"inputs": items}).encode())


# ---- inputs


def varied(service: Service, count: int, seed: int = 0) -> list[Any]:
    """Return inputs like a service's examples: images of noise, and rows whose numbers differ."""
    draw = random.Random(seed)
    examples = service.item["examples"]
    return [_varied(examples[place % len(examples)], service.item, draw) for place in range(count)]


def _varied(item: Any, schema: Any, draw: random.Random) -> Any:
    changed = dict(item)
    for name, value in item.items():
        own = schema.get("properties", {}).get(name, {})
        if own.get("contentEncoding") == "base64":
            changed[name] = _noise(value, draw)
        elif isinstance(value, float):
            changed[name] = value * draw.uniform(0.5, 1.5)
    return changed


def _noise(image: str, draw: random.Random) -> str:
    """Return an image of noise as large as another one."""
    import base64
    import io

    from PIL import Image

    size = Image.open(io.BytesIO(base64.b64decode(image))).size
    file = io.BytesIO()
    Image.frombytes("L", size, draw.randbytes(size[0] * size[1])).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


# ---- throughput


@dataclass
class Rate:
    """Inputs a second of the clock, and of the processor, in each round."""

    clock: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def add(self, inputs: int, clock: float, processor: float) -> None:
        self.clock.append(inputs / clock)
        self.processor.append(inputs / max(processor, 1e-9))


def throughput(run: str, rounds: int, seconds: float) -> dict[str, Rate]:
    """Return the rates of the bare model and of its service."""
    model = apps.load(run)
    service = service_of(model)(model)
    items = varied(service, BATCH)
    inputs = [service.read(item) for item in items]
    many, single = [request_for(items)], [request_for([item]) for item in items]
    rates = {name: Rate() for name in ("bare", "bare, and reads", f"requests of {BATCH}", "requests of 1")}
    with serving(run) as server:
        for number in range(rounds + 1):
            measured = {
                "bare": _bare(lambda: service.predict(inputs), seconds),
                "bare, and reads": _bare(lambda: service.predict([service.read(item) for item in items]), seconds),
                f"requests of {BATCH}": asyncio.run(_served(server, many, 4, BATCH, seconds)),
                "requests of 1": asyncio.run(_served(server, single, CONNECTIONS, 1, seconds)),
            }
            if number:  # the first round warms up
                for name, figures in measured.items():
                    rates[name].add(*figures)
    return rates


def _bare(answer: Callable[[], Sequence[Any]], seconds: float) -> tuple[int, float, float]:
    begin, computed, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() < begin + seconds:
        count += len(answer())
    return count, time.perf_counter() - begin, time.process_time() - computed


async def _served(
    server: Server, requests: Sequence[bytes], connections: int, inputs: int, seconds: float
) -> tuple[int, float, float]:
    begin, computed, count = time.perf_counter(), server.processor_seconds, 0

    async def ask(place: int) -> None:
        nonlocal count
        connection = Connection(server.port)
        while time.perf_counter() < begin + seconds:
            status, body = await connection.ask(requests[place % len(requests)])
            if status != 200:
                raise RuntimeError(f"{status}: {body.decode()}")
            count += inputs
        connection.close()

    await asyncio.gather(*(ask(place) for place in range(connections)))
    return count, time.perf_counter() - begin, server.processor_seconds - computed


# ---- a load


@dataclass
class Load:
    """What came of the requests of a load.

    Attributes:
        answered: answers by status.
        closed: requests whose connection was closed, or refused, before a whole answer.
        wrong: answers with another status or other values than they must have, in words.
        memory: bytes that the service held after each hundredth of the requests.
        seconds: that each answer took.
        exit_code: of the service; None where it goes on.
        last_line: what it printed last.
    """

    answered: Counter[int] = field(default_factory=Counter)
    closed: int = 0
    wrong: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    exit_code: int | None = None
    last_line: str = ""

    @property
    def num_answered(self) -> int:
        """The number of answers that came."""
        return sum(self.answered.values())


def mixed(service: Service, count: int = 64) -> list[tuple[bytes, int, Any]]:
    """Return requests with the status of their answers, and the outputs where they are good: 4 in 5 are."""
    kinds: list[tuple[bytes, int, Any]] = []
    items = varied(service, count)
    outputs = [service.predict([service.read(item)])[0] for item in items]
    for place in range(count):
        some = items[place : place + 1 + place % 5]
        kinds.append((request_for(some), 200, outputs[place : place + len(some)]))
    large = f"{_HEAD}Content-Length: {100 * 2**20}\r\n\r\n".encode()
    bad = [
        (request_of(b'{"inputs": ['), 400),
        (request_of(json.dumps({"inputs": [{}]}).encode()), 422),
        (request_of(b"{}"), 422),
        (request_of(b"[" * 100_000), 400),
        (request_of(b"{}", _HEAD.replace("application/json", "text/plain")), 415),
        (request_of(b"{}", _HEAD.replace("/predict", "/other")), 404),
        (b"GET /predict HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
        (b"GET /healthz HTTP/1.1\r\nHost: elsewhere.example\r\n\r\n", 400),
        (large + bytes(2**20), 413),
        (request_of(b'{"inputs": []}'), 422),
    ]
    kinds += [(*bad[place % len(bad)], None) for place in range(count // 4)]
    random.Random(0).shuffle(kinds)
    return kinds


def load(
    run: str,
    requests: int,
    ending: signal.Signals | None = None,
    connections: int = CONNECTIONS,
) -> Load:
    """Send a service a load, with a signal to it after half of the requests, and return what came of them.

    Args:
        run: what is served.
        requests: number of requests.
        ending: the signal; None: none, and all requests are sent.
        connections: connections that send them.
    """
    model = apps.load(run)
    service = service_of(model)(model)
    kinds = mixed(service)
    result = Load()
    with serving(run) as server:
        asyncio.run(_send(server, kinds, requests, ending, connections, result))
        if ending is None:
            server.process.terminate()
        assert server.process.stdout is not None
        result.last_line = server.process.stdout.read().strip()
        result.exit_code = server.process.wait(60)
    return result


async def _send(
    server: Server,
    kinds: Sequence[tuple[bytes, int, Any]],
    requests: int,
    ending: signal.Signals | None,
    connections: int,
    result: Load,
) -> None:
    numbers, signaled = iter(range(requests)), False

    async def ask() -> None:
        nonlocal signaled
        connection = Connection(server.port)
        for number in numbers:
            if number % max(1, requests // 100) == 0 and (ending is None or number < requests // 2):
                result.memory.append(server.memory)
            if ending is not None and number == requests // 2:
                server.process.send_signal(ending)
                signaled = True
            request, status, outputs = kinds[number % len(kinds)]
            began = time.perf_counter()
            try:
                answer, body = await connection.ask(request)
            except (OSError, EOFError):
                result.closed += 1
                if not signaled:
                    result.wrong.append(f"request {number}: the connection was closed")
                continue
            result.answered[answer] += 1
            result.seconds.append(time.perf_counter() - began)
            if answer != status:
                result.wrong.append(f"request {number}: {answer} in place of {status}: {body[:200]!r}")
            elif outputs is not None and not alike(json.loads(body)["outputs"], json.loads(json.dumps(outputs))):
                result.wrong.append(f"request {number}: {body[:200]!r}")
        connection.close()

    await asyncio.gather(*(ask() for _ in range(connections)))


def alike(one: Any, other: Any) -> bool:
    """Tell whether two answers are equal, numbers to 1e-4: other rows of a batch move the last digits."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-5)
    return bool(one == other)


# ---- the table


def _quartiles(values: Sequence[float]) -> list[float]:
    return statistics.quantiles(values, n=4) if len(values) > 1 else [*values] * 3


def _print_rates(run: str, rates: dict[str, Rate]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, rate in rates.items():
        ratio = statistics.median(s / b for s, b in zip(rate.clock, rates["bare"].clock, strict=True))
        low, middle, high = _quartiles(rate.clock)
        cost = 1e6 / statistics.median(rate.processor)
        print(
            f"{Path(run).name:<24} {name:<16} {middle:>9,.0f} ({low:,.0f}-{high:,.0f}) inputs/s, {ratio:.2f} of bare",
            end="",
        )
        print(f", {cost:,.0f} us of the processor each")
        figures[name] = {"inputs_per_second": [low, middle, high], "of_bare": ratio, "processor_us": cost}
    return figures


def _print_load(name: str, result: Load) -> dict[str, Any]:
    memory = [round(held / 2**20, 1) for held in result.memory]
    print(f"{name}: {result.num_answered:,} answers {dict(sorted(result.answered.items()))}, {result.closed:,} closed")
    print(f"  wrong: {len(result.wrong)}; exit code {result.exit_code}; {result.last_line}")
    if memory:
        print(f"  memory, MiB: {memory[0]} at first, {memory[len(memory) // 10]} after a tenth, {memory[-1]} at last")
    for line in result.wrong[:5]:
        print(f"  {line}")
    return {
        "answered": {str(status): count for status, count in sorted(result.answered.items())},
        "closed": result.closed,
        "wrong": len(result.wrong),
        "exit_code": result.exit_code,
        "memory_mib": memory,
        "last_line": result.last_line,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--json", type=Path, help="write all figures to this file too")
    args = parser.parse_args(argv)
    print(machine_line())
    figures: dict[str, Any] = {"machine": machine_line(), "throughput": {}, "load": {}}
    for run in args.runs:
        figures["throughput"][Path(run).name] = _print_rates(run, throughput(run, args.rounds, args.seconds))
    endings: dict[str, signal.Signals | None] = {"all": None, "SIGTERM": signal.SIGTERM, "SIGKILL": signal.SIGKILL}
    for name, ending in endings.items() if args.requests else ():
        figures["load"][name] = _print_load(name, load(args.runs[0], args.requests, ending))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
