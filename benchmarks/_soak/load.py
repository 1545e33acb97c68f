"""Load: services that stay up from case to case, under good and bad requests, signals, slow and idle clients."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import apps
from apps.base.quiet import quiet
from apps.serve.service.command import service_of
from benchmarks._soak.outcome import Outcome
from benchmarks.service import _HEAD, CONNECTIONS, Load, Server, _send, load, mixed, serving

sys.path.append(str(Path(__file__).parents[2] / "tests" / "support"))
WEIGHT = 4
GROWTH, FIRST = 1.02, 1000
"""Most memory of a service over that after its first so many requests."""
IDLE = 10_000
CLOSING = _HEAD + "Connection: close\r\n"


@dataclass
class Kept:
    """A service that stays up, with its requests and their answers, and what it has held and taken so far."""

    server: Server
    kinds: list[tuple[bytes, int, Any]]
    answered: int = 0
    memory: int = 0
    seconds: list[float] = field(default_factory=list)

    @property
    def good(self) -> bytes:
        """A good request for one input, whose connection is closed after its answer."""
        request = next(request for request, status, outputs in self.kinds if status == 200 and len(outputs) == 1)
        return request.replace(_HEAD.encode(), CLOSING.encode())

    def load(self, number: int, requests: int) -> str:
        """Send requests from 64 connections, and return what is wrong with their answers or the memory."""
        start = number % len(self.kinds)
        kinds = self.kinds[start:] + self.kinds[:start]
        asyncio.run(_send(self.server, kinds, requests, None, CONNECTIONS, result := Load()))
        self.seconds += result.seconds
        self.answered += requests
        if not self.memory and self.answered >= FIRST:
            self.memory = self.server.memory
        if self.memory and self.server.memory > GROWTH * self.memory:
            result.wrong.append(f"memory grew from {self.memory:,} to {self.server.memory:,} after {self.answered:,}")
        return "; ".join(result.wrong[:3])


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
            with contextlib.suppress(ConnectionError):
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


def hub(folder: Path) -> Path:
    """Write a tiny language model of transformers, whose answers the service streams, with a tokenizer of bytes."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "</s>"]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"eos_token_id": 256, "pad_token_id": 256}
    config = transformers.OlmoeConfig(vocab_size=len(letters), num_experts=4, num_experts_per_tok=2, **sizes, **ids)
    for part in (transformers.OlmoeForCausalLM(config), fast):
        part.save_pretrained(folder)
    return folder


def ends(run: str) -> str:
    """Send SIGTERM in the middle of a load: what was taken is answered."""
    result = load(run, 1000, signal.SIGTERM)
    told = f"serve: ended; answered requests: {result.num_answered:,}"
    is_right = not result.wrong and result.exit_code == 0 and result.last_line == told
    return "" if is_right else f"{result.wrong[:3]}, exit code {result.exit_code}, {result.last_line!r}"


SPECIAL: dict[str, tuple[str, Callable[[Kept], str]]] = {
    "crowd": ("digits", crowd),
    "starving": ("digits", starving),
    "cut streams": ("hub", cut),
}


def cases(numbers: Iterator[int], folder: Path) -> Iterator[Outcome]:
    """Yield in turn a thousand requests at a classifier, a special case, and a hundred requests at another app."""
    from shown_runs import RUNS

    others = [name for name in RUNS if name != "digits"]
    turns = zip(itertools.repeat("digits"), itertools.cycle([*SPECIAL, "SIGTERM"]), others, strict=False)
    turn, makers, kept = [*itertools.chain(*turns)], {**RUNS, "hub": hub}, dict[str, Kept]()
    with contextlib.ExitStack() as stack:
        runs = dict[str, str]()
        for number in numbers:
            name = turn[number % len(turn)]
            app = SPECIAL[name][0] if name in SPECIAL else "digits" if name == "SIGTERM" else name
            if app not in runs:
                (folder / app).mkdir()
                with quiet(own_notes=False):
                    runs[app] = str(makers[app](folder / app))
            if name == "SIGTERM":
                yield Outcome(number, "SIGTERM: in a load", ends(runs[app]), 1000)
                continue
            if name not in kept:
                model = apps.load(runs[app])
                options = ["--max_requests", "4"] if name in ("crowd", "cut streams") else []
                server = stack.enter_context(serving(runs[app], *options))
                kept[name] = Kept(server, mixed(service_of(model)(model)))
            if name in SPECIAL:
                yield Outcome(number, f"{name}: of {app}", SPECIAL[name][1](kept[name]))
                continue
            requests, own = 1000 if name == "digits" else 100, kept[name]
            yield Outcome(number, f"{name}: requests", own.load(number, requests), requests)
            if own.answered % 10_000 == 0:
                p50, p99 = 1000 * np.quantile(own.seconds, [0.5, 0.99])
                told = f"{own.answered:,} requests, p50 {p50:.0f} ms, p99 {p99:.0f} ms, {own.server.memory >> 20} MiB"
                yield Outcome(number, f"{name}: {told}", count=0)
