"""An answer as it is written: server-sent events with what is new, and the whole output at the end."""

from __future__ import annotations

import json

import pytest
from served import served_numbers
from starlette.testclient import TestClient

JSON = {"content-type": "application/json"}


def counting(inputs):
    """Tell "1", "12", ... up to each number; 100 fails after its first."""
    answers = []
    for value in inputs:
        number, tell = value if isinstance(value, tuple) else (value, lambda text: None)
        for end in range(1, number + 1):
            tell("".join(map(str, range(1, end + 1))))
            if number == 100:
                raise RuntimeError("full")
        answers.append(2 * number)
    return answers


@pytest.fixture
def client():
    app, _ = served_numbers(counting, listen=lambda number, tell: (number, tell))
    with TestClient(app) as client:
        yield client


def events(response):
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in response.text.strip().split("\n\n"):
        name, data = "", ""
        for line in block.splitlines():
            key, _, value = line.partition(": ")
            name, data = (value, data) if key == "event" else (name, value)
        found.append((name, json.loads(data)))
    return found


def test_each_event_has_the_new_part_and_the_last_the_output(client):
    response = client.post("/stream", content=b'{"inputs": [4]}', headers=JSON)
    parts = [("", {"text": text}) for text in "1234"]
    assert events(response) == [*parts, ("end", {"outputs": [8]})]


def test_a_failure_is_an_event_and_what_was_written_is_not_repeated(client):
    assert events(client.post("/stream", content=b'{"inputs": [100]}', headers=JSON)) == [
        ("", {"text": "1"}),
        ("error", {"error": "the model failed on an input (RuntimeError)"}),
    ]


def test_bad_input_is_answered_before_the_stream_begins(client):
    for body, status in ((b'{"inputs": [2, 4]}', 422), (b'{"inputs": [3]}', 422), (b"", 400)):
        response = client.post("/stream", content=body, headers=JSON)
        assert response.status_code == status
        assert list(response.json()) == ["error"]


def test_only_services_with_growing_answers_have_a_stream(client):
    assert client.get("/openapi.json").json()["paths"]["/stream"]["post"]["operationId"] == "stream"
    app, _ = served_numbers()
    with TestClient(app) as other:
        assert other.post("/stream", content=b'{"inputs": [4]}', headers=JSON).status_code == 404
        assert "/stream" not in other.get("/openapi.json").json()["paths"]
