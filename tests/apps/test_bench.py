"""``moesaic bench``: the layer's benchmark measures what it says."""

from __future__ import annotations

import json

import pytest

from apps.bench import main


def test_layer_benchmark_writes_a_row_for_each_system_with_the_dense_one_as_unit(tmp_path, capsys):
    path = tmp_path / "rows.json"
    arguments = [
        "layer",
        "--shapes",
        "E64",
        "--dtypes",
        "float32",
        "--rounds",
        "1",
        "--backends",
        "cpu",
        "--threads",
        "1",
    ]
    assert main([*arguments, "--json", str(path)]) == 0
    rows = {row["system"]: row for row in json.loads(path.read_text())["rows"]}
    assert set(rows) == {"dense", "moesaic cpu"}
    assert rows["dense"]["ratio"] == 1.0
    # One pre-activation a row, T * K * F floats, not T * E * F: 4096 * 8 * 256 * 4 bytes are 33.6 MB; the rest is the
    # router's, some numbers a token and expert.
    assert 33.6 < rows["moesaic cpu"]["kept_mb"] < 33.6 + 0.2 * 33.6
    assert "| moesaic cpu |" in capsys.readouterr().out


def test_unknown_benchmark_names_the_known_ones():
    with pytest.raises(ValueError, match="benchmark 'leyer' is not one of layer"):
        main(["leyer"])
