"""The service over HTTP: answers, at once or as they grow, refusals with one line each, the token, limits, counters."""

from __future__ import annotations

import gzip
import html
import json
import math
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from served import LIMITS, TOKEN, served_numbers
from starlette.testclient import TestClient

from apps.serve.service.options import Limits
from apps.serve.service.reading import Refused, parse

JSON = {"content-type": "application/json"}
TWO = b'{"inputs": [2]}'


@pytest.fixture(scope="module")
def client():
    app, _ = served_numbers()
    with TestClient(app) as client:
        yield client


def refusal(response, status):
    """Return the line of a refusal."""
    assert response.status_code == status
    assert list(response.json()) == ["error"]
    assert "\n" not in response.json()["error"]
    return response.json()["error"]


@pytest.mark.parametrize(
    "body, status, line",
    [
        (b"", 400, "the body is no JSON: Expecting value: line 1 column 1 (char 0)"),
        (b'{"inputs": [2}', 400, "the body is no JSON: Expecting ',' delimiter: line 1 column 14 (char 13)"),
        (b'{"inputs": [NaN]}', 400, "the body is no JSON: NaN is no number of JSON"),
        (b'{"inputs": [1e999]}', 400, "the body is no JSON: 1e999 is too large for a number"),
        (b'"\\ud83d"', 400, "the body is no JSON: half a surrogate pair is no character"),
        (b'"\xff"', 400, "the body is no JSON in UTF-8: byte 1 is 0xff"),
        (b"[]", 422, 'the body: is not of type "object"'),
        (b"null", 422, 'the body=null is not of type "object"'),
        (b'"\\ud83d\\ude00"', 422, 'the body="\U0001f600" is not of type "object"'),
        (b"{}", 422, 'the body: "inputs" is a required property'),
        (b'{"inputs": []}', 422, "inputs: has less than 1 item"),
        (b'{"inputs": [0, 2, 4, 6, 8]}', 422, "inputs: has more than 4 items"),
        (b'{"inputs": [2, "x"]}', 422, 'inputs[1]="x" is not of type "integer"'),
        (b'{"inputs": [2], "top": 1}', 422, "the body: Additional properties are not allowed ('top' was unexpected)"),
        (b'{"inputs": [102]}', 422, "inputs[0]=102 is greater than the maximum of 100"),
        (b'{"inputs": [2, 3]}', 422, "inputs[1]: 3 is odd"),
    ],
)
def test_what_is_wrong_with_a_body_is_one_line(client, body, status, line):
    assert refusal(client.post("/predict", content=body, headers=JSON), status) == line


@pytest.mark.parametrize("depth", [300, 900])  # Python reads 990 levels, the schema's library 255
@pytest.mark.parametrize("opens, closes", [(b"[", b"]"), (b'{"a":', b"}")])
def test_json_that_is_too_deep_is_one_line(depth, opens, closes):
    app, _ = served_numbers(limits=Limits(body=10_000))
    body = b'{"inputs": ' + opens * depth + b"1" + closes * depth + b"}"
    with TestClient(app) as client:
        line = refusal(client.post("/predict", content=body, headers=JSON), 400)
    assert line == "the body is no JSON that can be read: it is too deep"
    with pytest.raises(Refused, match=line):
        parse(b"[" * 500_000)


@pytest.mark.parametrize(
    "method, path, given, status, line",
    [
        ("post", "/predict", {"content": TWO, "headers": {"content-type": "text/plain"}}, 415,
         "content-type='text/plain' is not application/json"),
        ("post", "/predict", {"content": gzip.compress(TWO), "headers": {**JSON, "content-encoding": "gzip"}}, 415,
         "content-encoding='gzip' is not read: send the JSON as it is"),
        ("post", "/predict", {"content": b" " * 1_001, "headers": JSON}, 413,
         "the body has 1001 bytes: at most 1000 are read"),
        ("get", "/nothing", {}, 404, "there is no /nothing"),
        ("post", "/predict/", {"content": TWO, "headers": JSON}, 404, "there is no /predict/"),
        ("delete", "/predict", {}, 405, "DELETE is not for /predict"),
        ("get", "/docs", {"headers": {"host": "attacker.example:80"}}, 400,
         "host is none of this service's names: 127.0.0.1, [::1], testserver"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_request_is_one_line(client, method, path, given, status, line):
    response = getattr(client, method)(path, **given)
    assert refusal(response, status) == line
    assert status != 405 or response.headers["allow"] == "POST"


def test_inputs_are_answered_in_their_order_as_the_interface_says(client):
    response = client.post("/predict", content=b'{"inputs": [2, 8.0, 0.4e1]}', headers=JSON)  # all of them whole
    assert (response.status_code, response.json()) == (200, {"outputs": [4, 16, 8]})
    in_pieces = client.post("/predict", content=iter([b" " * 600] * 3), headers=JSON)  # a body without a length
    assert "at most 1000 are read" in refusal(in_pieces, 413)
    document = client.get("/openapi.json").json()
    request = document["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]
    assert request["schema"]["properties"]["inputs"]["maxItems"] == LIMITS.inputs
    assert client.post("/predict", json=request["example"]).json() == {"outputs": [4, 8]}
    page = client.get("/docs")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert '"maximum": 100' in html.unescape(page.text)
    assert client.get("/healthz").json() == {"status": "ok"}


def test_the_token():
    app, _ = served_numbers(token=TOKEN)
    with TestClient(app) as client:
        assert client.get("/healthz").status_code == 200
        response = client.post("/predict", json={"inputs": [2]})
        assert refusal(response, 401) == "the request has no token: send Authorization: Bearer TOKEN"
        assert response.headers["www-authenticate"] == "Bearer"
        for wrong in (f"Bearer {TOKEN}x", "Bearer", "Bearer \xff", f"Basic {TOKEN}", TOKEN):
            for path in ("/metrics", "/docs", "/openapi.json", "/nothing"):
                response = client.get(path, headers={"authorization": wrong.encode("latin-1")})
                assert refusal(response, 401).startswith("the request has a wrong token")
                assert TOKEN not in response.text
        client.headers["authorization"] = f"bearer {TOKEN}"
        assert client.post("/predict", json={"inputs": [2]}).json() == {"outputs": [4]}
        assert client.get("/openapi.json").json()["components"]["securitySchemes"]["token"]["scheme"] == "bearer"


def test_a_request_too_many_is_503():
    go_on, at_work = threading.Event(), threading.Semaphore(0)

    def waits(inputs):
        at_work.release()
        go_on.wait()
        return list(inputs)

    def sent():
        while (response := client.post("/predict", json={"inputs": [2]})).status_code == 503:
            pass  # the request below was there first
        return response

    app, _ = served_numbers(waits)
    with TestClient(app) as client, ThreadPoolExecutor(LIMITS.requests) as pool:
        try:
            answers = [pool.submit(sent) for _ in range(LIMITS.requests)]
            at_work.acquire()
            while (response := client.get("/nothing")).status_code == 404:  # until all the others have come
                pass
            assert refusal(response, 503) == "3 requests are answered at the same time: try again later"
            assert response.headers["retry-after"] == "1"
            assert client.get("/healthz").status_code == 200
        finally:
            go_on.set()
        assert [answer.result().status_code for answer in answers] == [200] * LIMITS.requests


@pytest.mark.parametrize(
    "wrong, status, line",
    [
        (KeyError("secret"), 500, "the model failed on an input (KeyError)"),
        (MemoryError(), 503, "the machine has too little memory for an input of this size"),
        (SystemExit(), 503, "the model has broken down"),
        (math.nan, 500, "the service failed"),  # an answer that is no number is none
    ],
)
def test_a_model_that_fails_shows_nothing_of_itself(wrong, status, line):
    def fails(inputs):
        if isinstance(wrong, BaseException):
            raise wrong
        return [wrong for _ in inputs]

    app, batcher = served_numbers(fails)
    is_broken = isinstance(wrong, SystemExit)
    with TestClient(app, raise_server_exceptions=wrong is not math.nan) as client:
        assert refusal(client.post("/predict", json={"inputs": [2]}), status) == line
        health = client.get("/healthz")
        assert (health.json() == {"status": "broken"}) == (health.status_code != 200) == batcher.broken == is_broken
        if is_broken:
            line = "the model is not at work any more"
            assert refusal(client.post("/predict", json={"inputs": [2]}), 503) == line


def test_the_counters():
    app, _ = served_numbers()
    with TestClient(app) as client:
        client.post("/predict", json={"inputs": [2, 4]})
        client.post("/predict", json={"inputs": ["x"]})
        client.get("/nothing")
        lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[0] != "#")
    counted = {
        **{f'moesaic_requests_total{{path="/predict",status="{status}"}}': "1.0" for status in (200, 422)},
        'moesaic_requests_total{path="other",status="404"}': "1.0",
        'moesaic_request_seconds_count{path="/predict"}': "2.0",
        'moesaic_service{run="numbers"}': "1.0",
        "moesaic_requests_open": "1.0",  # this one
    }
    assert {name: lines[name] for name in counted} == counted


# ---- answers as they grow


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
def writing():
    app, _ = served_numbers(counting, listen=lambda number, tell: (number, tell))
    with TestClient(app) as client:
        yield client


def events(response):
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = [re.fullmatch(r"(?:event: (\w+)\n)?data: (.*)", block) for block in response.text.strip().split("\n\n")]
    return [(block[1] or "", json.loads(block[2])) for block in blocks]


def test_each_event_has_the_new_part_and_the_last_the_output_or_a_failure(writing):
    parts = [("", {"text": text}) for text in "1234"]
    failed = ("error", {"error": "the model failed on an input (RuntimeError)"})
    for body, expected in ((b"4", [*parts, ("end", {"outputs": [8]})]), (b"100", [parts[0], failed])):
        response = writing.post("/stream", content=b'{"inputs": [' + body + b"]}", headers=JSON)
        assert events(response) == expected
    for body, status in ((b'{"inputs": [2, 4]}', 422), (b'{"inputs": [3]}', 422), (b"", 400)):
        refusal(writing.post("/stream", content=body, headers=JSON), status)  # before the stream begins


def test_only_services_with_growing_answers_have_a_stream(client, writing):
    assert writing.get("/openapi.json").json()["paths"]["/stream"]["post"]["operationId"] == "stream"
    assert client.post("/stream", content=b'{"inputs": [4]}', headers=JSON).status_code == 404
    assert "/stream" not in client.get("/openapi.json").json()["paths"]
