"""The Triton kernels run on the right card in the right tiles: environment, launches, tuning."""

from __future__ import annotations

import contextlib
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import core
from core import kernels
from core.kernels import resolve_backend
from core.kernels.triton_ops import environment, launch, products, tuning
from core.kernels.triton_ops.tuning import Tile

pytest.importorskip("triton")


def test_what_is_missing_is_named(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert environment.missing(cpu, torch.float32) is None
    assert environment.missing(cpu, torch.float64) == "the kernels have no torch.float64"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "interpreter" in environment.missing(cpu, torch.float32)
    with pytest.warns(UserWarning, match=r"backend='triton' does not run torch.bfloat16 on cpu: a CPU runs Triton in"):
        assert resolve_backend("triton", "cpu", torch.bfloat16) == "eager"
    assert environment.missing(torch.device("mps"), torch.float32) == "the kernels are for CUDA, not for mps"
    monkeypatch.setattr(environment, "card", lambda *_: (7, 5))
    assert environment.missing(cuda, torch.float16) == "a card of sm_75 is older than sm_80"
    with pytest.warns(UserWarning, match=r"backend='auto' runs 'grouped' on cuda: a card of sm_75 is older than sm_80"):
        assert resolve_backend("auto", "cuda", torch.float16) == "grouped"
    monkeypatch.setattr(environment, "triton_version", lambda: (2, 1))
    assert environment.missing(cuda, torch.float16).startswith("triton 2.1 is older than 3.6 (pip install")
    monkeypatch.setattr(environment, "triton_version", lambda: None)
    with pytest.warns(UserWarning, match=r"backend='triton' runs 'grouped' on cuda: triton is not installed"):
        assert resolve_backend("triton", "cuda", torch.bfloat16) == "grouped"
    assert environment.missing(cuda, torch.float16) == "triton is not installed (pip install -U 'triton>=3.6')"


def test_the_card_that_counts_is_that_of_the_tensors(monkeypatch):
    monkeypatch.setattr(environment, "_capability", lambda index: [(9, 0), (7, 5)][index])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert resolve_backend("auto", "cuda", torch.float64) == "eager"
    assert resolve_backend("auto", "cpu", torch.bfloat16) == "cpu"
    assert (
        resolve_backend("auto", "cuda", torch.bfloat16) == resolve_backend("auto", "cuda:0", torch.float16) == "triton"
    )
    core.kernels.fallback._warn.cache_clear()
    with pytest.warns(UserWarning, match=r"backend='auto' runs 'grouped' on cuda: a card of sm_75 is older than sm_80"):
        assert resolve_backend("auto", "cuda:1", torch.bfloat16) == "grouped"
    assert tuning.tuner("A card") is tuning.tuner("A card")
    assert tuning.tuner("A card") is not tuning.tuner("Another")


def test_a_tile_is_measured_for_each_way_a_product_is_taken(monkeypatch):
    x, w, offsets, gates = torch.randn(4, 8), torch.randn(2, 8, 8), torch.tensor([2, 4]), torch.rand(4)
    with launch.written_down() as summed:
        products.column_sums(x, offsets)
    with launch.written_down() as starts:
        for options in ({}, {"bias": w[:, 0]}, {"gates_R": gates}, {"second": (x, w)}, {"transposed": True}):
            products.linear(x, w, offsets, x, **options)
        monkeypatch.setattr(products, "_flags", lambda _: {"PRECISION": "tf32"})
        products.linear(x, w, offsets, x)
    assert starts[0].flags() == ("ieee",)
    assert starts[1].flags() == ("BIAS", "ieee")
    assert len({start.flags() for start in starts}) == len(starts)
    for start in (*starts, *summed):  # fused, whatever Triton's default is
        assert all(start.options(tile)["enable_fp_fusion"] is True for tile in start.tiles())


@pytest.mark.parametrize(
    ("tile", "matrices", "resident"),
    [
        # 3 stages of (128 + 256) * 64 half-precision numbers are 147,456 bytes, and 1,024 beside them: 1 in 233,472.
        (Tile(128, 256, 8, 3), 1, 1),
        (Tile(128, 128, 8, 3), 1, 2),  # 3 * 256 * 64 * 2 + 1,024 = 99,328
        (Tile(64, 128, 4, 4), 1, 2),  # 4 * 192 * 64 * 2 + 1,024 = 99,328
        (Tile(128, 64, 8, 4), 2, 1),  # gated, two weights: 4 * 256 * 64 * 2 + 1,024 = 132,096
        (Tile(128, 64, 8, 4), 1, 2),  # 4 * 192 * 64 * 2 + 1,024 = 99,328
        (Tile(16, 64, 4, 4), 1, 2),  # five have room, and two are enough
    ],
)
def test_as_many_programs_start_on_hopper_as_have_room_and_before_it_one_a_tile(tile, matrices, resident, monkeypatch):
    monkeypatch.setattr(tuning, "interpreted", lambda: False)
    monkeypatch.setattr(launch, "card", lambda device: [(9, 0), (8, 0)][device.index])
    monkeypatch.setattr(launch, "_multiprocessors", lambda index: (132, 233_472))
    hopper, before = (SimpleNamespace(device=torch.device("cuda", i), dtype=torch.bfloat16) for i in (0, 1))
    assert launch.programs(10_000, hopper, tile, matrices) == resident * 132
    assert launch.programs(100, hopper, tile, matrices) == 100
    on_cpu = torch.empty(0, dtype=torch.bfloat16)
    assert launch.programs(10_000, before, tile) == launch.programs(10_000, on_cpu, tile) == 10_000


def half_tiles(kernel: str, rows: float) -> list[tuple[int, int]]:
    return [(t.m, t.n) for t in tuning.tiles(kernel, (64, 64), torch.bfloat16, rows)]


def test_tiles_are_not_much_taller_than_an_expert_has_rows(monkeypatch):
    monkeypatch.setattr(tuning, "interpreted", lambda: False)
    assert half_tiles("linear", 4096)[0] == (128, 256)
    assert half_tiles("linear", 16) == [(32, 128)]
    assert half_tiles("linear", 1) == [(16, 128)]
    # Either the wide tensor-core instruction for all that may be tried, or one height alone.
    for kernel, rows in itertools.product(("up", "up_geglu", "up_swiglu", "linear"), (4096, 64, 32, 8)):
        heights = {m for m, _ in half_tiles(kernel, rows)}
        assert min(heights) >= 64 or len(heights) == 1
    assert len(half_tiles("hidden_grad", 4096)) == 1, "its sums depend on the tile: it is not tuned"
    # Masks take registers, and so do rows that are no multiple of 16 bytes.
    for widths, tile in (
        ((2048, 1408), (128, 256)),
        ((2040, 1400), (128, 128)),
        ((2042, 1408), (64, 64)),
        ((2048, 1401), (64, 64)),
    ):
        first = tuning.tiles("linear", widths, torch.bfloat16, 4096)[0]
        assert (first.m, first.n) == tile


def test_tuner_measures_a_shape_once_keeps_it_and_survives_a_broken_file(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(tuning, "interpreted", lambda: False)
    monkeypatch.setenv("MOESAIC_TUNING_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    asked = []

    def fastest(candidates, run):
        asked.append(candidates)
        return candidates[2]

    monkeypatch.setattr(tuning, "_fastest", fastest)
    args = ("linear", (64, 2048, 1408), ("BIAS", "ieee"), torch.bfloat16, 4096.0, lambda tile: None)
    expected = tuning.PLAIN[2]
    tuner = tuning.Tuner("A card/1")
    assert tuner.choose(*args) == tuner.choose(*args) == expected
    assert len(asked) == 1
    (file,) = tmp_path.glob("*.json")
    assert list(json.loads(file.read_text())) == ["linear/bfloat16/13/64/2048/1408/BIAS/ieee"]
    assert tuning.Tuner("A card/1").choose(*args) == expected
    assert len(asked) == 1, "another process reads what was measured"
    file.write_text("{")
    assert tuning.Tuner("A card/1").choose(*args) == expected
    assert len(asked) == 2
    assert "cannot be read" in caplog.text
    monkeypatch.setenv("MOESAIC_TUNE", "0")
    assert tuning.Tuner("A card/1").choose(*args) == tuning.PLAIN[0]
    monkeypatch.delenv("MOESAIC_TUNE")
    monkeypatch.setattr(tuning, "MAX_SHAPES", 1)
    for width in (64, 128):
        assert tuner.choose("linear", (8, width, width), *args[2:]) == tuning.PLAIN[0], "the list is bounded"
    assert caplog.text.count("1 shapes are measured on A card/1: others take the default tile") == 1
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.Tuner("A card/1").choose("linear", (9, 64, 64), *args[2:]) == tuning.PLAIN[0]


def test_processes_that_measure_side_by_side_keep_each_other_s_tiles(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "interpreted", lambda: False)
    monkeypatch.setenv("MOESAIC_TUNING_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "_fastest", lambda candidates, run: candidates[1])

    def measure(tuner: tuning.Tuner, width: int) -> None:
        tuner.choose("linear", (8, width, width), (), torch.bfloat16, 4096.0, lambda tile: None)

    def kept() -> list[int]:
        (file,) = tmp_path.glob("*.json")
        return sorted(int(key.split("/")[4]) for key in json.loads(file.read_text()))

    first, second = tuning.Tuner("A card"), tuning.Tuner("A card")
    for tuner, width in ((first, 64), (second, 128), (first, 256)):
        measure(tuner, width)
    assert kept() == [64, 128, 256]
    # The first has read the second's. A tile that is on no list any more takes no place among the shapes.
    monkeypatch.setattr(tuning, "_fastest", lambda *_: pytest.fail("measured again"))
    measure(first, 128)
    monkeypatch.setattr(tuning, "TABLES", ())
    assert tuning._read(next(tmp_path.glob("*.json"))) == {}


def test_tiles_that_cannot_be_kept_are_measured_in_each_process(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(tuning, "interpreted", lambda: False)
    (tmp_path / "file").write_text("in the way of a folder")
    monkeypatch.setenv("MOESAIC_TUNING_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "_fastest", lambda candidates, run: candidates[1])
    replaced = []
    monkeypatch.setattr(tuning.os, "replace", lambda *paths: replaced.append(paths))
    tuner = tuning.Tuner("A card/1")
    for width in (64, 128, 256):
        args = ("linear", (64, 2048, width), (), torch.bfloat16, 4096.0, lambda tile: None)
        assert tuner.choose(*args) == tuner.choose(*args) == tuning.PLAIN[1]
    assert not replaced
    assert caplog.text.count("measured tiles are not kept") == 1


def test_a_tile_of_an_older_list_is_measured_anew_and_without_memory_the_default_runs(monkeypatch):
    monkeypatch.setattr(tuning, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    answers = iter([None, tuning.PLAIN[2]])
    monkeypatch.setattr(tuning, "_fastest", lambda candidates, run: next(answers))
    tuner = tuning.Tuner("A card/1")
    tuner.loaded = True
    tuner.best["linear/bfloat16/13/64/2048/1408/BIAS/ieee"] = Tile(16, 16, 1, 1)
    args = ("linear", (64, 2048, 1408), (), torch.bfloat16, 4096.0, lambda tile: None)
    assert tuner.choose(*args) == tuning.PLAIN[0]
    assert tuner.choose(*args) == tuner.choose(*args) == tuning.PLAIN[2]


def test_tiles_that_need_more_than_the_card_has_are_passed_over(monkeypatch):
    from triton.runtime.errors import OutOfResources

    def run(tile: Tile) -> None:
        if tile.m == 128:
            raise OutOfResources(300_000, 232_448, "shared memory")

    times = {64: 2.0, 32: 1.0}
    last: list[Tile] = []

    def bench(fn, **_):
        fn()
        return times[last[-1].m]

    monkeypatch.setattr("triton.testing.do_bench", bench)
    tiles = (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3), Tile(32, 64, 4, 3))
    assert tuning._fastest(tiles, lambda tile: (last.append(tile), run(tile))) == tiles[2]

    def full(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("triton.testing.do_bench", full)
    assert tuning._fastest(tiles, run) is None, "the timer's own memory is not there"


class Clock:
    """A timer in place of ``do_bench``: it runs once what it is given, and says how long each backend takes."""

    def __init__(self, monkeypatch, folder, **seconds: float) -> None:
        self.seconds, self.asked = seconds, []
        monkeypatch.setenv("MOESAIC_TUNING_CACHE", str(folder))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(launch, "_card_name", lambda device: f"A card of {folder}")
        monkeypatch.setattr(kernels, "resolve_backend", lambda name, *_: "triton" if name == "auto" else name)
        monkeypatch.setattr(kernels, "_may_measure", lambda x: True)
        monkeypatch.setattr("triton.testing.do_bench", self.time)

    def time(self, fn, **_):
        fn()
        (name,) = fn.args
        self.asked.append(name)
        return self.seconds[name]


def _problem(learns: bool = True):
    torch.manual_seed(0)
    x, weights = torch.randn(8, 16), (torch.randn(2, 16, 16), torch.randn(2, 16, 16))
    weights = kernels.FFNWeights(*(w.requires_grad_(learns) for w in weights))
    rows = kernels.RowIndex(torch.arange(8), torch.tensor([3, 8], dtype=torch.int32), None, None)
    return x, rows, torch.rand(8), weights, "relu"


@pytest.mark.parametrize("fastest", ["grouped", "eager"])
def test_auto_runs_the_backend_that_was_fastest_where_a_shape_was_first_met(fastest, monkeypatch, tmp_path):
    seconds = {"triton": 2.0, "grouped": 3.0, "eager": 4.0} | {fastest: 1.0}
    clock, ran = Clock(monkeypatch, tmp_path, **seconds), []
    for name in seconds:
        own = kernels.BACKENDS[name].expert_ffn
        monkeypatch.setattr(
            kernels.BACKENDS[name], "expert_ffn", lambda *a, own=own, name=name: (ran.append(name), own(*a))[1]
        )
    y = kernels.expert_ffn(*_problem())
    assert clock.asked == ["triton", "grouped", "eager"]
    assert ran[-1] == fastest
    torch.testing.assert_close(y, kernels.expert_ffn(*_problem(), backend="eager"))
    kernels.expert_ffn(*_problem())
    assert len(clock.asked) == 3, "it is measured once"
    kernels.expert_ffn(*_problem(learns=False))
    assert len(clock.asked) == 6, "without a backward another one may be the fastest"
    assert set(tuning._read(next(tmp_path.glob("*.json"))).values()) == {fastest}
    assert kernels.expert_linear(torch.randn(8, 16), torch.randn(2, 16, 16), torch.tensor([3, 8]).int()).shape == (
        8,
        16,
    )
    assert len(clock.asked) == 9
    monkeypatch.setenv("MOESAIC_TUNE", "0")
    kernels.expert_ffn(*_problem())
    assert ran[-1] == "triton"


def test_measuring_in_a_checkpoint_leaves_its_saved_tensors_alone(monkeypatch, tmp_path):
    Clock(monkeypatch, tmp_path, triton=2.0, grouped=1.0, eager=3.0)
    x, rows, gates_R, weights, activation = _problem()

    def block(x):
        return kernels.expert_ffn(x, rows, gates_R, weights, activation)

    checkpoint(block, x.requires_grad_(), use_reentrant=False).sum().backward()
    got = x.grad.clone(), weights.w_in.grad.clone()
    x.grad = weights.w_in.grad = None
    block(x).sum().backward()
    torch.testing.assert_close(got, (x.grad, weights.w_in.grad))


def test_a_backend_that_could_not_be_measured_stays_the_default(monkeypatch, tmp_path):
    clock = Clock(monkeypatch, tmp_path, triton=2.0, grouped=1.0, eager=3.0)
    monkeypatch.setattr(tuning, "_fastest", lambda *_: None)  # there is no memory for the timer
    args = ("key", torch.device("cpu"), dict.fromkeys(("triton", "grouped"), lambda: None))
    assert launch.fastest(*args) == "triton"
    monkeypatch.setattr(tuning, "_fastest", lambda *_: pytest.fail("measured again"))
    assert launch.fastest(*args) == "triton"
    assert not clock.asked
