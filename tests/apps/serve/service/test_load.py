"""A real service under requests that are drawn from its own OpenAPI document, and under a load with a signal in it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from shown_runs import RUNS

from benchmarks.service import load, serving

# What a schema cannot say: that a text is an image, and how many subwords a text has.
NOT_IN_THE_SCHEMA = {"digits", "pairs", "captioner", "translator", "tasks", "language"}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_requests_drawn_from_the_interface(name, tmp_path):
    schemathesis = Path(sys.executable).with_name("schemathesis")
    if not schemathesis.is_file():
        pytest.skip("needs schemathesis")
    left_out = ["--exclude-checks", "positive_data_acceptance"] if name in NOT_IN_THE_SCHEMA else []
    with serving(str(RUNS[name](tmp_path)), "--max_inputs", "4") as server:
        url = f"http://127.0.0.1:{server.port}/openapi.json"
        options = ["--checks", "all", *left_out, "--max-examples", "20", "--seed", "1", "--no-color"]
        options += ["--request-timeout", "300"]  # a language model writes up to 256 subwords for each input
        command = [schemathesis, "run", url, *options]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)  # it keeps what it finds there
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("ending", [None, signal.SIGTERM, signal.SIGKILL])
def test_ten_thousand_requests_good_and_bad(ending, tmp_path):
    result = load(str(RUNS["digits"](tmp_path)), 10_000, ending)
    assert result.wrong == []
    assert set(result.answered) == {200, 400, 404, 405, 413, 415, 422}
    if ending is None:
        assert (result.num_answered, result.closed) == (10_000, 0)
        tenth = len(result.memory) // 10
        assert result.memory[-1] < 1.1 * result.memory[2 * tenth]  # allocators warm up in the first fifth
    if ending is signal.SIGKILL:
        assert result.exit_code == -signal.SIGKILL
    else:  # all that were taken are answered
        assert result.exit_code == 0
        assert result.last_line == f"serve: ended; answered requests: {result.num_answered:,}"
