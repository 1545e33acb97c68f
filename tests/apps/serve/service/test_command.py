"""``moesaic serve``: wrong options are one line, and a signal ends it after what it has taken."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from commands import fails
from shown_runs import digits_run

import core
from apps.cli import main
from apps.serve.service import options
from apps.serve.service.command import device_of, prepared, service_of
from apps.serve.service.options import ServeOptions
from apps.vision.task import ImageClassification

TOKEN = "0123456789abcdef"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return digits_run(tmp_path_factory.mktemp("digits"))


@pytest.fixture(autouse=True)
def without_a_token(monkeypatch):
    monkeypatch.delenv("MOESAIC_TOKEN", raising=False)


def test_wrong_options_are_one_line(digits, tmp_path, capsys, monkeypatch):
    assert main(["serve", "--help"]) == 0
    out = capsys.readouterr().out
    names = ["ckpt_path RUN", "host", "port N", "token_file PATH", "max_batch N", "max_wait_ms X", "max_inputs N"]
    names += ["max_body N", "max_requests N", "device NAME", "quantize int8|int4[:GROUP]", "offload SIZE[:FILE]"]
    assert all(f"--{name}" in out for name in names)
    serve = ("serve", "--ckpt_path", str(digits), "--port")
    for code, argv, line in (
        (1, ("--max_batch", "0"), "max_batch=0 must be at least 1"),
        (1, ("--max_wait_ms", "nan"), "max_wait_ms=nan must not be negative"),
        (2, ("--token", TOKEN), "token does not exist; did you mean 'token_file'?"),
        (2, ("--offload", "0"), "offload=0 leaves no expert on the device"),
        (2, ("--quantize", "int3"), "quantize=int3 is not one of int8, int4"),
        (1, ("--host", "0.0.0.0"), "host=0.0.0.0 is for other machines too, and needs a token: give --token_file FILE"),
        (1, ("--ckpt_path", str(tmp_path / "none")), f"no checkpoint {tmp_path}/none"),
    ):
        assert fails(capsys, code, *serve, "0", *argv).startswith(line)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = fails(capsys, 1, *serve, str(port))
        assert line == f"port={port} cannot be used (Address already in use): give another --port, or 0 for any"
    monkeypatch.setattr(options, "LIBRARIES", ("starlette_that_is_missing",))
    assert fails(capsys, 1, *serve, "0") == (
        "moesaic serve needs starlette_that_is_missing, which is not installed: "
        'pip install -e ".[serve]" in the source tree of moesaic'
    )


@pytest.mark.parametrize(
    "text, rule",
    [
        ("short", "has a token of 5 characters: it must have at least 16"),
        ("", "has a token of 0 characters: it must have at least 16"),
        ("two words of a token", "must hold one token of visible ASCII characters"),
        ("caf\u00e9 0123456789abcdef", "must hold one token of visible ASCII characters"),
    ],
)
def test_tokens_that_are_none_are_not_shown(digits, tmp_path, capsys, text, rule):
    file = tmp_path / "token"
    file.write_text(text + "\n")
    line = fails(capsys, 1, "serve", "--ckpt_path", str(digits), "--port", "0", "--token_file", str(file))
    assert line == f"token_file={file} {rule}"


def test_a_token_comes_from_a_file_or_the_environment_and_devices_and_models_that_are_none_are_refused(
    digits, tmp_path, monkeypatch
):
    argv = ["--ckpt_path", str(digits), "--port", "0", "--host", "0.0.0.0"]
    monkeypatch.setenv("MOESAIC_TOKEN", TOKEN)
    assert ServeOptions.read(argv).token == TOKEN
    (tmp_path / "token").write_text(f"{TOKEN}-of-the-file\n")
    read = ServeOptions.read([*argv, "--token_file", str(tmp_path / "token")])
    assert read.token == f"{TOKEN}-of-the-file"
    assert TOKEN not in repr(read)
    with pytest.raises(ValueError, match=r"^device=tpu is none of this machine$"):
        device_of("tpu")
    no_service = r"^there is no service of torch.nn.modules.linear.Linear: there is of VisionClassifier, "
    with pytest.raises(ValueError, match=no_service):
        service_of(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    "form",
    [
        ("--quantize", "int4"),
        ("--offload", "0.5"),
        ("--quantize", "int8", "--offload", "0.5:experts.safetensors"),
    ],
)
def test_cheaper_forms_of_the_experts_answer_alike(digits, form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def answers(*argv):
        model, offloaded = prepared(ServeOptions.read(["--ckpt_path", str(digits), "--port", "0", *argv]))
        service = service_of(model)(model)
        (answer,) = service.predict([service.read(item) for item in service.item["examples"]])
        assert (offloaded is not None and offloaded.statistics.needed > 0) == ("--offload" in argv)
        return core.expert_bytes(model), answer

    (bytes_before, resident), (bytes_after, cheaper) = answers(), answers(*form)
    assert (bytes_after < bytes_before) == ("--quantize" in form)
    assert cheaper["top"] == pytest.approx(resident["top"], abs=0 if "--quantize" not in form else 0.05)


def run_command(argv, lines):
    """Run ``moesaic serve``; its stdout goes to the pipe ``lines``."""
    os.dup2(lines.fileno(), 1)
    sys.stdout = os.fdopen(1, "w")
    sys.exit(main(["serve", *argv]))


@contextlib.contextmanager
def serving(run):
    """Serve a run in a process of its own: yields the process, its port and its further lines."""
    fork = multiprocessing.get_context("fork")  # the libraries are there already
    receiving, sending = fork.Pipe(duplex=False)
    server = fork.Process(target=run_command, args=(["--ckpt_path", str(run), "--port", "0"], sending))
    server.start()
    sending.close()
    try:
        with os.fdopen(os.dup(receiving.fileno())) as lines:
            first = lines.readline()
            said = rf"serve: {run.name} \(VisionClassifier, .*/best\.ckpt\) at http://127\.0\.0\.1:(\d+)\n"
            match = re.fullmatch(said, first)
            assert match is not None, first
            yield server, int(match[1]), lines
    finally:
        server.kill()
        server.join()


def example_of(port):
    """Return the body of the example of a service's document."""
    with urllib.request.urlopen(f"http://localhost:{port}/openapi.json", timeout=60) as answer:
        request = json.load(answer)["paths"]["/predict"]["post"]["requestBody"]
    return json.dumps(request["content"]["application/json"]["example"]).encode()


def listens(port):
    """Tell whether somebody listens there; one who ends just now may reset the connection."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=60).close()
    except ConnectionResetError:
        return True
    except ConnectionRefusedError:
        return False
    return True


def ends(server, lines, answered, code=0):
    assert lines.read() == f"serve: ended; answered requests: {answered}\n"
    server.join(60)
    assert server.exitcode == code


def test_at_sigterm_what_was_taken_is_answered(digits):
    with serving(digits) as (server, port, lines):
        body = example_of(port)
        head = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
        with socket.create_connection(("127.0.0.1", port), timeout=60) as asking:
            asking.sendall(f"{head}{len(body)}\r\n\r\n".encode() + body[:10])
            with urllib.request.urlopen(f"http://localhost:{port}/healthz", timeout=60) as health:
                assert health.status == 200  # by now the other request has been taken
            os.kill(server.pid, signal.SIGTERM)
            while listens(port):
                time.sleep(0.01)
            asking.sendall(body[10:])
            answer = b"".join(iter(lambda: asking.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert list(json.loads(answer.partition(b"\r\n\r\n")[2])) == ["outputs"]
        ends(server, lines, 3)


def test_a_signal_that_comes_with_the_first_line_ends_it(digits):
    with serving(digits) as (server, _, lines):
        os.kill(server.pid, signal.SIGTERM)
        ends(server, lines, 0)


def test_a_model_that_breaks_down_ends_the_service(digits, monkeypatch):
    def breaks(*arguments):
        raise SystemExit

    monkeypatch.setattr(ImageClassification, "classify", breaks)
    with serving(digits) as (server, port, lines):
        request = urllib.request.Request(f"http://localhost:{port}/predict", example_of(port))
        request.add_header("content-type", "application/json")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=60)
        assert (refused.value.code, json.load(refused.value)) == (503, {"error": "the model has broken down"})
        ends(server, lines, 2, code=1)
