"""The server of ``moesaic demo``: it answers its own page, and leaves nothing behind."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import sys
import tempfile

import pytest
from shown_runs import digits_run
from starlette.testclient import TestClient

from apps.cli import main
from apps.report.exhibit import Answer, Exhibit, ImageField

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs gradio")

UPLOAD = "/gradio_api/upload"
FILES = {"files": ("a.png", b"x", "image/png")}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    from apps.demonstrate.command import local_app
    from apps.demonstrate.page import appearance, build_page

    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "gradio"))
        exhibit = Exhibit("", "", (ImageField("Image"),), lambda values: Answer(()))
        app = local_app(build_page(exhibit, "page", folder), **appearance())
    with TestClient(app, "http://127.0.0.1:7860") as client:
        yield client


@pytest.mark.parametrize(
    "headers, status",
    [
        ({}, 200),  # a script on this machine
        ({"origin": "http://127.0.0.1:7860"}, 200),
        ({"host": "localhost:9000", "origin": "http://localhost:9000"}, 200),  # a forwarded port
        ({"origin": "http://attacker.example"}, 403),
        ({"origin": "http://127.0.0.1:8888"}, 403),  # another server on this machine
        ({"origin": "http://localhost:7860"}, 403),
        ({"origin": "null"}, 403),  # a page in a sandbox, or in a file
        ({"host": "attacker.example:7860", "origin": "http://attacker.example:7860"}, 400),  # a rebound name
        ({"host": "[::1]attacker.example"}, 400),
    ],
)
def test_another_page_can_upload_and_call_nothing(client, headers, status):
    assert client.post(UPLOAD, files=FILES, headers=headers).status_code == status
    assert (client.post("/gradio_api/queue/join", json={}, headers=headers).status_code == status) == (status != 200)
    assert client.get("/", headers=headers).status_code == status
    two_hosts = [("host", "127.0.0.1:7860"), ("host", "attacker.example")]
    assert client.get("/", headers=two_hosts).status_code == 400


def run_command(argv, folder, lines):
    """Run ``moesaic demo``, whose temporary files are in a folder; its stdout goes to the pipe ``lines``."""
    os.dup2(lines.fileno(), 1)
    sys.stdout = os.fdopen(1, "w")
    tempfile.tempdir = str(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    sys.exit(main(["demo", *argv]))


@pytest.mark.parametrize("ending, code", [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_and_no_folder_is_left(ending, code, tmp_path):
    httpx = pytest.importorskip("httpx")
    run, left = digits_run(tmp_path), tmp_path / "temporary"
    left.mkdir()
    fork = multiprocessing.get_context("fork")  # the libraries are there already
    receiving, sending = fork.Pipe(duplex=False)
    demo = fork.Process(target=run_command, args=(["--ckpt_path", str(run), "--port", "0"], left, sending))
    demo.start()
    sending.close()
    try:
        with os.fdopen(os.dup(receiving.fileno())) as lines:
            _, url = (lines.readline().split()[1] for _ in ("checkpoint", "demo"))
        (uploaded,) = httpx.post(url + UPLOAD, files=FILES, timeout=60).json()
        assert uploaded.startswith(str(left))
        os.kill(demo.pid, ending)
        demo.join(60)
        assert demo.exitcode == code
    finally:
        demo.kill()
        demo.join()
    assert list(left.iterdir()) == []
