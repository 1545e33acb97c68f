"""The Triton kernels compiled for cards that are not here: they build, fit, and multiply on tensor cores."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import pytest
from places import ROOT

from benchmarks import compile_kernels
from core.kernels import ALL_ACTIVATIONS
from core.kernels.triton_ops import tuning

pytest.importorskip("triton")
KERNELS = {
    "products": {"up", "linear", "hidden_grad", "weight_grad"},
    "sums": {"sum_of_k", "sum_of_any", "sum_grad", "gate_grad", "column_sums"},
    "sort": {"count", "place"},
    "gate": {"choose", "totals", "choose_grad"},
}


def python(*arguments: str) -> str:
    """Return what Python prints, run where the interpreter is off."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TRITON_DEFAULT_FP_FUSION")}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout, done.stderr
    assert "FP_FUSION" not in done.stderr, "Triton warns of a default that is about to change"
    return done.stdout


FLOATING = (*KERNELS["products"], *KERNELS["sums"])
WITHOUT_PRODUCTS = (*KERNELS["sort"], *KERNELS["gate"])
SIMPLE = ("column_sums", "gate_grad", "sum_of_k", "sum_grad")
FLOATS = ["--dtypes", "bfloat16", "--matrices", "float", "--arch"]
REPORTS = {
    "bfloat16": [*FLOATS, "80", "--widths", "whole", "--one_tile", "--kernels", *FLOATING],
    "newer cards": [*FLOATS, "90", "100", "--widths", "whole", "--one_tile", "--kernels", "hidden_grad"],
    "without products": ["--arch", "90", "--dtypes", "float32", "--widths", "whole", "--kernels", *WITHOUT_PRODUCTS],
}
"""Options of ``compile_kernels``, by the name of its report."""

SCRIPT = """
import json, sys, torch
from benchmarks import compile_kernels
from core.kernels.triton_ops.launch import jit_function

for name, options in json.loads(sys.argv[1]).items():
    print(json.dumps(["report", name]))
    compile_kernels.main(["--first", "--json", *options])
print(json.dumps(["report", "specialized"]))
for tokens in (4096, 4095, 1):
    for start in compile_kernels.launches(torch.float32, (2048, 1408), tokens=tokens):
        options = start.options(start.tiles()[0])
        types, _, aligned = compile_kernels.specialized(jit_function(start.kernel), start.args, options)
        print(json.dumps([tokens, start.kernel, types, str(aligned)]))
print(json.dumps(["report", "constants"]))
for dtype in compile_kernels.PRODUCTS:
    for shape in ({}, {"num_experts": 1, "top_k": 1}):
        with compile_kernels._precision(dtype):
            starts = compile_kernels.launches(compile_kernels.PRODUCTS[dtype], (2048, 1408), **shape)
        for start in starts:
            print(json.dumps([start.kernel, start.constants]))
"""


@pytest.fixture(scope="module")
def reports() -> dict[str, list]:
    """Return the lines of each of ``REPORTS``, and what ``SCRIPT`` prints of the launches, all from one process."""
    lines: dict[str, list] = {}
    for line in map(json.loads, python("-c", SCRIPT, json.dumps(REPORTS)).splitlines()):
        if isinstance(line, list) and line[0] == "report":
            name = line[1]
            lines[name] = []
        else:
            lines[name].append(line)
    return lines


def names(row: dict) -> str:
    return f"{row['kernel']} {row['dtype']} {row['tile']} sm_{row['arch']}"


def check(rows: list[dict], dtype: str) -> None:
    wrong = {names(r): r["wrong"] for r in rows if r["wrong"]}
    assert not wrong
    for row in rows:
        assert row["arch"] in compile_kernels.ARCHS
        assert row["spill"] <= compile_kernels.MAX_SPILL
        assert row["shared"] <= compile_kernels.SHARED_MEMORY[row["arch"]]
        multiplies = row["kernel"] in {f"products.{k}" for k in ("up", "linear", "hidden_grad", "weight_grad")}
        assert row["products"] == multiplies
        if multiplies and row["in_flight"] is not None:
            assert row["in_flight"] > 0, names(row)
        # float32 is exact: it must not run in tf32.
        assert row["tensor_cores"] == (multiplies and dtype != "float32"), names(row)


def written(tile: tuning.Tile) -> str:
    return f"{tile.m}x{tile.n} w{tile.warps} s{tile.stages}"


def check_tiles(rows: list[dict], tuned: dict[str, tuple[tuning.Tile, ...]], archs: tuple[int, ...]) -> None:
    """Assert that every tile of every kernel of ``tuned`` is there, for each card."""
    actual = {(r["kernel"], r["tile"], r["arch"]) for r in rows}
    for name, tiles in tuned.items():
        kernel = "products." + ("up" if name.startswith("up") else name.removesuffix("_quantized"))
        for tile, arch in itertools.product(tiles, archs):
            assert (kernel, written(tile), arch) in actual, (name, tile, arch)


def test_every_kernel_builds_in_bfloat16(reports):
    rows = reports["bfloat16"]
    check(rows, "bfloat16")
    assert {r["kernel"] for r in rows} >= {f"{f}.{k}" for f in ("products", "sums") for k in KERNELS[f]}


def test_products_run_on_the_tensor_cores_of_newer_cards(reports):
    rows = reports["newer cards"]
    check(rows, "bfloat16")
    assert {r["arch"] for r in rows if r["tensor_cores"]} == {90, 100}


def test_kernels_are_not_compiled_anew_for_another_number_of_tokens(reports):
    # 32768, 32760 and 8 pairs of 4096 tokens, 4095 and one: multiples of 16 or not, and 1, which is compiled in.
    by_tokens: dict[int, list[list]] = {4096: [], 4095: [], 1: []}
    for tokens, *compiled_for in reports["specialized"]:
        by_tokens[tokens].append(compiled_for)
    assert {kernel for kernel, *_ in by_tokens[4096]} == {f"{f}.{k}" for f, kernels in KERNELS.items() for k in kernels}
    assert by_tokens[4096] == by_tokens[4095] == by_tokens[1]


def test_kernels_that_multiply_nothing_build(reports):
    rows = reports["without products"]
    check(rows, "float32")
    assert {r["kernel"] for r in rows} == {f"{f}.{k}" for f in ("sort", "gate") for k in KERNELS[f]}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", compile_kernels.PRODUCTS)
def test_every_kernel_tile_and_flag_builds_for_three_cards(dtype):
    printed = python("-m", "benchmarks.compile_kernels", "--json", "--dtypes", dtype)
    rows = [json.loads(line) for line in printed.splitlines()]
    check(rows, dtype)
    half = (tuning.HALF_TILES, tuning.UNEVEN_TILES, tuning.RAGGED_TILES)
    full = (tuning.FULL_TILES, tuning.FULL_RAGGED_TILES)
    for tuned in {"tf32": (), "float32": full}.get(dtype, half):
        check_tiles(rows, tuned, compile_kernels.ARCHS)
    # 2040 numbers are read 16 bytes at a time, as 2048 are; 2041 one by one.
    for row in rows if dtype == "bfloat16" else ():
        if row["kernel"].split(".")[1] in SIMPLE and row["arch"] == 80:
            assert (row["widest"] == 16) == (row["widths"] != "odd"), names(row)


def test_every_flag_of_every_kernel_is_met_both_ways(reports):
    """Each constant of a kernel's source that may be on or off is compiled on and off."""
    values: dict[tuple[str, str], set] = {}
    for kernel, constants in reports["constants"]:
        for name, value in constants.items():
            values.setdefault((kernel, name), set()).add(value)
    one_way = {f"{kernel} {name}" for (kernel, name), met in values.items() if met in ({True}, {False})}
    # Widths of 2041 make the products uneven; the interpreter alone converts half precision by itself.
    assert not {name for name in one_way if name.split()[1] not in ("EVEN_K", "UPCAST")}
    assert values["products.up", "ACT"] == values["products.hidden_grad", "ACT"] == {*ALL_ACTIVATIONS}
    assert values["products.linear", "PRECISION"] == {"ieee", "tf32"}


def test_what_does_not_fit_is_said():
    fits = {"kernel": "products.up", "widths": "-", "dtype": "bfloat16", "tile": "-", "matrices": "float"}
    fits |= {"registers": 255, "products": True, "arch": 80, "spill": compile_kernels.MAX_SPILL, "shared": 163 * 1024}
    fits |= {"tensor_cores": True, "in_flight": 2, "widest": 16}
    for changed, wrong in (
        ({}, None),
        ({"in_flight": None}, None),
        ({"shared": 163 * 1024 + 1}, "needs 166913 bytes of shared memory, sm_80 has 166912"),
        ({"spill": 104}, "spills 104 bytes of registers, more than 96"),
        ({"tensor_cores": False}, "has no tensor-core instruction"),
        ({"in_flight": 0}, "waits for all that it loads before each product"),
    ):
        assert compile_kernels.Compiled(**fits | changed).wrong() == wrong
