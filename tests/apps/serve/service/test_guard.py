"""An answer that comes before the body: the rest is thrown away for a moment, and the connection is closed."""

from __future__ import annotations

import asyncio

import pytest
from served import TOKEN, served_numbers

from apps.serve.service.options import Limits


class Client:
    """One request to an ASGI application, whose body comes piece by piece."""

    def __init__(self, pieces, headers, more=True):
        self.pieces, self.more, self.received, self.sent = list(pieces), more, 0, []
        path = {"path": "/predict", "raw_path": b"/predict", "query_string": b""}
        self.scope = {"type": "http", "method": "POST", **path, "headers": [(b"host", b"testserver"), *headers]}

    async def receive(self):
        if not self.pieces:
            if self.more:
                await asyncio.sleep(60)  # the rest never comes
            return {"type": "http.disconnect"}
        piece = self.pieces.pop(0)
        self.received += len(piece)
        return {"type": "http.request", "body": piece, "more_body": self.more or bool(self.pieces)}

    async def send(self, message):
        self.sent.append(message)

    def ask(self, limits, token=None):
        app, _ = served_numbers(token=token, limits=limits)
        asyncio.run(app(self.scope, self.receive, self.send))
        return self.sent[0]["status"], dict(self.sent[0]["headers"])


JSON = (b"content-type", b"application/json")
LIMITS = Limits(body=1_000, inputs=4, requests=3, seconds=0.05)


def is_closed(client, status, token=None):
    """Ask for an answer of a status, and return whether the connection is closed with it."""
    given, headers = client.ask(LIMITS, token)
    assert given == status
    return headers.get(b"connection") == b"close"


def test_a_hundred_megabytes_are_refused_by_their_length_and_not_read():
    client = Client([b" " * 100] * 1_000_000, [JSON, (b"content-length", b"100000000")])
    assert is_closed(client, 413)
    assert client.received == 1_000  # thrown away, so that a client that is still sending gets the answer
    assert [message.get("more_body", False) for message in client.sent[1:]] == [True, False]


def test_nothing_of_a_stranger_is_read_and_the_connection_is_closed():
    client = Client([b" " * 100] * 10, [JSON, (b"content-length", b"1000")])
    assert is_closed(client, 401, token=TOKEN)
    assert client.received == 0


def test_a_body_without_a_length_is_read_up_to_the_limit():
    client = Client([b" " * 300] * 1_000, [JSON, (b"transfer-encoding", b"chunked")])
    assert is_closed(client, 413)
    assert client.received == 1_200 + 1_200


def test_a_slow_body_is_408_and_a_client_that_goes_away_leaves_nothing_behind(monkeypatch):
    monkeypatch.setattr("apps.serve.service.guard._LINGER", 0.05)
    headers = [JSON, (b"content-length", b"20")]
    assert is_closed(Client([b'{"inputs"'], headers), 408)
    assert not is_closed(Client([], headers, more=False), 400)


@pytest.mark.parametrize(
    "header, status",
    [
        *(((b"content-length", length), 413) for length in (b"20x", b"-1", b"\xb2")),
        ((b"x", b"x" * LIMITS.head), 431),  # a head that is too large and whole at once
    ],
)
def test_a_length_or_a_head_that_is_none(header, status):
    assert Client([b" "], [JSON, header], more=False).ask(LIMITS)[0] == status


ONE = ["127.0.0.1"], ["127.0.0.1:8000"], ["[::1]:8000"], ["TESTSERVER"]
TWO = ["testserver", "testserver"], ["evil.example", "testserver"], ["testserver", "evil.example"]
BROKEN = ("[::1]evil.example", "[::1].evil.example:80", "127.0.0.1:80:80", "127.0.0.1:evil.example", "127.0.0.1:123456",
          "testserver@evil.example", "testserver ", "\u0661.0.0.1")  # fmt: skip


@pytest.mark.parametrize(
    "hosts, status",
    [
        *((hosts, 415) for hosts in ONE),  # who may ask is asked for JSON
        *((hosts, 400) for hosts in ([], *TWO, *([name] for name in BROKEN), ["evil.example"])),
    ],
)
@pytest.mark.parametrize("token", [None, TOKEN])
def test_a_request_names_its_host_once(hosts, status, token):
    client = Client([], [(b"authorization", b"Bearer " + TOKEN.encode())], more=False)
    client.scope["headers"] = [*client.scope["headers"][1:], *((b"host", name.encode()) for name in hosts)]
    # With a token any name will do.
    assert client.ask(LIMITS, token)[0] == (415 if token and hosts == ["evil.example"] else status)
