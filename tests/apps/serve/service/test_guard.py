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
        self.scope = {
            "type": "http",
            "method": "POST",
            "path": "/predict",
            "raw_path": b"/predict",
            "query_string": b"",
            "headers": [(b"host", b"testserver"), *headers],
        }

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


def test_a_hundred_megabytes_are_refused_by_their_length_and_not_read():
    client = Client([b" " * 100] * 1_000_000, [JSON, (b"content-length", b"100000000")])
    status, headers = client.ask(LIMITS)
    assert status == 413
    assert headers[b"connection"] == b"close"
    assert client.received == 1_000  # thrown away, so that a client that is still sending gets the answer
    assert [message.get("more_body", False) for message in client.sent[1:]] == [True, False]


def test_nothing_of_a_stranger_is_read_and_the_connection_is_closed():
    client = Client([b" " * 100] * 10, [JSON, (b"content-length", b"1000")])
    status, headers = client.ask(LIMITS, TOKEN)
    assert status == 401
    assert headers[b"connection"] == b"close"
    assert client.received == 0


def test_a_body_without_a_length_is_read_up_to_the_limit():
    client = Client([b" " * 300] * 1_000, [JSON, (b"transfer-encoding", b"chunked")])
    status, headers = client.ask(LIMITS)
    assert status == 413
    assert headers[b"connection"] == b"close"
    assert client.received == 1_200 + 1_200


def test_a_slow_body_is_408(monkeypatch):
    monkeypatch.setattr("apps.serve.service.guard._LINGER", 0.05)
    client = Client([b'{"inputs"'], [JSON, (b"content-length", b"20")])
    status, headers = client.ask(LIMITS)
    assert status == 408
    assert headers[b"connection"] == b"close"


def test_a_client_that_goes_away_leaves_nothing_behind():
    client = Client([b'{"inputs"'], [JSON, (b"content-length", b"20")], more=True)
    client.pieces, client.more = [], False
    status, headers = client.ask(LIMITS)
    assert status == 400
    assert b"connection" not in headers


@pytest.mark.parametrize("length", [b"20x", b"-1", b"\xb2"])
def test_a_length_that_is_none(length):
    status, _ = Client([b" "], [JSON, (b"content-length", length)], more=False).ask(LIMITS)
    assert status == 413


def test_a_head_that_is_too_large_and_whole_at_once():
    status, _ = Client([], [JSON, (b"x", b"x" * LIMITS.head)], more=False).ask(LIMITS)
    assert status == 431


@pytest.mark.parametrize(
    "hosts, status",
    [
        (["127.0.0.1"], 415),  # who may ask is asked for JSON
        (["127.0.0.1:8000"], 415),
        (["[::1]:8000"], 415),
        (["TESTSERVER"], 415),
        ([], 400),
        (["testserver", "testserver"], 400),
        (["evil.example", "testserver"], 400),
        (["testserver", "evil.example"], 400),
        (["[::1]evil.example"], 400),
        (["[::1].evil.example:80"], 400),
        (["127.0.0.1:80:80"], 400),
        (["127.0.0.1:evil.example"], 400),
        (["127.0.0.1:123456"], 400),
        (["testserver@evil.example"], 400),
        (["evil.example"], 400),
        (["testserver "], 400),
        (["\u0661.0.0.1"], 400),
    ],
)
@pytest.mark.parametrize("token", [None, TOKEN])
def test_a_request_names_its_host_once(hosts, status, token):
    client = Client([], [(b"authorization", b"Bearer " + TOKEN.encode())], more=False)
    client.scope["headers"] = [*client.scope["headers"][1:], *((b"host", name.encode()) for name in hosts)]
    # With a token any name will do.
    assert client.ask(LIMITS, token)[0] == (415 if token and hosts == ["evil.example"] else status)
