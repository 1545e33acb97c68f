"""Raw connections to a service: what a client that has shown nothing yet can take of it is bounded."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import threading
import time
from collections import Counter

import pytest
from served import TOKEN, listening, served_numbers

from apps.serve.service.options import Limits

LIMITS = Limits(body=1_000, inputs=4, requests=3, head_seconds=0.3)
PATIENT = Limits(body=1_000, inputs=4, requests=3, waiting=20)
GET = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n"
POST = b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def port():
    with listening(served_numbers(limits=LIMITS)[0], LIMITS) as port:
        yield port


def connect(port):
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def rest(connection):
    """Return what still comes on a connection until the service closes it."""
    answer = b""
    with contextlib.suppress(ConnectionResetError):
        while some := connection.recv(65536):
            answer += some
    return answer


def ask(port, request):
    """Send a request, and return its answer; the service may close the connection before all is sent."""
    with connect(port) as connection:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(request)
        return rest(connection)


@pytest.mark.parametrize(
    "request_",
    [
        GET + b"x: " + b"x" * 2**20,  # never complete
        GET + b"x: " + b"x" * 2**17 + b"\r\n\r\n",  # complete
        GET + b"x: y\r\n" * 2**15 + b"\r\n",
        b"GET /" + b"x" * 2**17 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\nx: " + b"x" * 2**20,  # what may follow a body
    ],
    ids=["line", "header", "headers", "path", "trailer"],
)
def test_a_head_that_is_too_large(port, request_):
    answer = ask(port, request_)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert answer.endswith(b'{"error": "the head of a request has at most 65536 bytes"}')
    assert ask(port, b"no HTTP\r\n\r\n").endswith(b'\r\n\r\n{"error": "Invalid HTTP request received."}')


@pytest.mark.parametrize("begin", [b"", GET, GET + b"\r\n" + GET])
def test_a_head_that_does_not_come_ends_the_connection(port, begin):
    with connect(port) as connection:
        connection.sendall(begin)
        answer = rest(connection)
    assert answer.count(b"HTTP/1.1 200 ") == begin.count(b"\r\n\r\n")


def held():
    """Return a model that waits, an event when it has come so far, and one that lets it go on."""
    came, go_on = threading.Event(), threading.Event()

    def waits(inputs):
        came.set()
        go_on.wait()
        return list(inputs)

    return waits, came, go_on


def test_a_body_and_an_answer_may_take_longer_than_a_head():
    waits, came, go_on = held()
    with listening(served_numbers(waits, limits=LIMITS)[0], LIMITS) as port, connect(port) as slow:
        slow.sendall(POST + b"Content-Length: 15\r\n\r\n")
        assert ask(port, b"") == b""  # this one came later, and its time is over
        slow.sendall(b'{"inputs": [2]}')
        came.wait()
        assert ask(port, b"") == b""
        go_on.set()
        assert slow.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_of_too_many_connections_the_one_that_has_waited_longest_is_closed():
    with listening(served_numbers(limits=PATIENT)[0], PATIENT) as port, contextlib.ExitStack() as stack:
        first = stack.enter_context(connect(port))
        assert ask(port, GET + b"Connection: close\r\n\r\n").startswith(b"HTTP/1.1 200 ")  # the first has been taken
        time.sleep(0.01)  # the loop's clock counts milliseconds
        others = [stack.enter_context(connect(port)) for _ in range(PATIENT.requests + PATIENT.waiting)]
        assert rest(first) == b""
        for connection in others:
            connection.sendall(GET + b"\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_strangers_and_bodies_that_are_refused_and_still_come_lock_nobody_out():
    with listening(served_numbers(limits=PATIENT)[0], PATIENT) as port, contextlib.ExitStack() as stack:
        for _ in range(2 * (PATIENT.requests + PATIENT.waiting)):
            stack.enter_context(connect(port)).sendall(POST + b"Content-Length: 900\r\n\r\n{")
        assert ask(port, GET + b"Connection: close\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    app, _ = served_numbers(token=TOKEN, limits=PATIENT)
    with listening(app, PATIENT) as port, contextlib.ExitStack() as stack:
        for path in [b"/predict", b"/healthz"] * PATIENT.requests:
            stranger = stack.enter_context(connect(port))
            stranger.sendall(POST.replace(b"/predict", path) + b"Content-Length: 900\r\n\r\n")
            assert stranger.recv(65536).startswith(b"HTTP/1.1 4")
        known = f"Authorization: Bearer {TOKEN}\r\nConnection: close\r\nContent-Length: 15\r\n\r\n".encode()
        assert ask(port, POST + known + b'{"inputs": [2]}').endswith(b'{"outputs":[4]}')


def test_a_stream_that_is_cut_frees_its_place_and_leaves_no_work():
    waits, came, go_on = held()
    app, batcher = served_numbers(waits, limits=PATIENT, listen=lambda number, tell: number)
    stream = POST.replace(b"/predict", b"/stream") + b"Content-Length: 15\r\n\r\n" + b'{"inputs": [2]}'
    with listening(app, PATIENT) as port, connect(port) as first:
        first.sendall(stream)
        came.wait()
        for _ in range(2 * PATIENT.requests):
            with connect(port) as cut:
                cut.sendall(stream)
                assert cut.recv(65536).startswith(b"HTTP/1.1 200 ")
                assert len(batcher) == 1
            while len(batcher):
                time.sleep(0.01)
        go_on.set()
        assert b'data: {"outputs":[2]}' in first.recv(65536) + first.recv(65536)


def test_slow_bodies_lock_nobody_out(monkeypatch):
    monkeypatch.setattr("apps.serve.service.reading._SLOW", 0.1)
    with listening(served_numbers(limits=PATIENT)[0], PATIENT) as port, contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connect(port)) for _ in range(PATIENT.requests)]
        for connection in slow:
            connection.sendall(POST + b"Content-Length: 900\r\n\r\n{")
        request = POST + b"Connection: close\r\nContent-Length: 15\r\n\r\n" + b'{"inputs": [2]}'
        while (answer := ask(port, request)).startswith(b"HTTP/1.1 503 "):  # until the slow ones have had their time
            time.sleep(0.01)
        assert answer.endswith(b'{"outputs":[4]}')
        assert slow[0].recv(65536).endswith(b'{"error":"the body did not arrive while others waited"}')


@pytest.mark.parametrize("keeps", [False, True])
def test_a_service_that_ends_under_load_resets_no_connection(keeps):
    """100 clients ask a slow model, again and again. When it ends, each gets whole answers and then a refusal."""

    def slow(inputs):
        time.sleep(0.05)
        return list(inputs)

    found, limits = Counter(), Limits(body=1_000, inputs=4, requests=16)
    close = b"" if keeps else b"Connection: close\r\n"
    request = POST + close + b'Content-Length: 15\r\n\r\n{"inputs": [2]}'

    async def asks(port):
        streams = None
        while True:
            try:
                streams = streams or await asyncio.open_connection("127.0.0.1", port)
            except ConnectionRefusedError:
                found["refused"] += 1
                return
            try:
                streams[1].write(request)
                head = (await streams[0].readuntil(b"\r\n\r\n")).lower()
                await streams[0].readexactly(int(re.search(rb"content-length: (\d+)", head)[1]))
                found[head[9:12].decode()] += 1
            except (OSError, EOFError) as error:
                found[type(error).__name__] += 1
                head = b"connection: close"
            if b"connection: close" in head:
                streams = streams[1].close()

    async def crowd(port):
        await asyncio.gather(*(asks(port) for _ in range(100)))

    with listening(served_numbers(slow, limits=limits)[0], limits, ends_after=0.5) as port:
        asyncio.run(crowd(port))
    assert found.keys() == {"200", "503", "refused"}, found
    assert found["refused"] == 100
