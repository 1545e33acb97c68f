"""``make gpu``: what it would run, the table that it writes, and its one line without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from places import ROOT

from benchmarks import gpu


def test_without_a_gpu_it_ends_in_one_line():
    done = subprocess.run([sys.executable, "benchmarks/gpu.py"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert not done.stdout
    assert done.stderr == f"make gpu needs a CUDA GPU, and torch {torch.__version__} sees none: nothing was run\n"


def test_every_part_names_files_that_are_there_and_two_gpus_have_more(tmp_path):
    one, two = (gpu.parts(tmp_path, num) for num in (1, 2))
    assert [part.name for part in two[len(one) :]] == ["two-ddp", "two-fsdp", "two-expert_parallel"]
    files = [word for part in two for word in part.command if word.endswith((".yaml", ".py"))]
    assert len(files) == 1 + len(gpu.APPS) + 2 * 3
    assert all((ROOT / file).is_file() for file in files)


def test_a_part_that_fails_is_a_row_and_the_next_one_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(gpu, "machine_facts", lambda: {"device": "A card"})
    run_dir, layer = tmp_path / "run", tmp_path / "layer.json"
    run_dir.mkdir()
    (run_dir / "metrics.csv").write_text("train/loss,train/examples_per_second\n2.0,1000\n1.5,\n")
    system = {"shape": "T=8", "dtype": "float32", "system": "moesaic auto", "us_per_token": 1.25}
    say = f"import json; json.dump({{'rows': [{system}]}}, open({str(layer)!r}, 'w'))"
    wanted = [
        gpu.Part("tests", ("-c", "print('one'); print('a | b'); raise SystemExit(3)")),
        gpu.Part("layer", ("-c", say), json=layer),
        gpu.Part("fit-vision", ("-c", "print('done')"), run_dir=run_dir),
    ]
    monkeypatch.setattr(gpu, "parts", lambda folder, num_gpus: wanted)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [(row["part"], row["code"], row["last_line"]) for row in rows] == [
        ("tests", 3, "a | b"),
        ("layer", 0, ""),
        ("fit-vision", 0, "done"),
    ]
    assert rows[2]["figures"] == {"train/examples_per_second": 1000.0, "train/loss": 1.5}
    written = (tmp_path / "gpu.md").read_text()
    assert "| tests | failed (3) |" in written
    assert "a \\| b" in written
    assert "| T=8 | float32 | moesaic auto | 1.25 |" in written
    assert "3 parts, failed: tests" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gpu.main(["--only", "tset", "--out", str(tmp_path)])
