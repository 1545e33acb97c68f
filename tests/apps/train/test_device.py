"""The device, the precision and the threads of a training; measured steps are made ones on made machines."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch.plugins import MixedPrecision, Precision
from quiet_trainer import quiet_trainer
from tiny_app import CONFIG, TinyModule

import core
from apps.base import machine
from apps.base.machine import threads_are_given
from apps.cli import main
from apps.compare import training as training_file
from apps.compare.training import same_threads
from apps.train import device as device_file, threads as threads_file
from apps.train.device import device_line, device_options, set_matmul_precision
from apps.train.threads import WINDOW, Threads, threads_of_steps


def gpu(monkeypatch, has_bfloat16: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bfloat16)


def test_a_gpu_is_taken_with_the_precision_that_it_has_and_what_is_named_is_kept(monkeypatch):
    # No precision: Lightning's default is 32-true.
    assert device_options({"accelerator": "auto", "precision": None}) == {"accelerator": "cpu"}
    gpu(monkeypatch)
    assert device_options({}) == {"accelerator": "cuda", "precision": "bf16-mixed"}
    assert device_options({"accelerator": "gpu"}) == {"accelerator": "gpu", "precision": "bf16-mixed"}
    assert device_options({"accelerator": "cpu"}) == {"accelerator": "cpu"}
    assert device_options({"precision": "32-true"}) == {"accelerator": "cuda"}
    # Lightning takes a plugin or a name, not both.
    assert device_options({"plugins": [MixedPrecision("bf16-mixed", "cpu")]}) == {"accelerator": "cuda"}
    gpu(monkeypatch, has_bfloat16=False)
    assert device_options({}) == {"accelerator": "cuda"}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_says_in_one_line_what_it_runs_on(tmp_path, precision):
    line = device_line(quiet_trainer(tmp_path, precision=precision), TinyModule(3, moe=core.MoEConfig(4)))
    device, own = line.rsplit(": ", 1)
    assert device.startswith("device cpu ")
    assert own == f"precision {precision}, threads {torch.get_num_threads()}, experts by cpu"


def test_a_gpu_multiplies_float32_on_tensor_cores_unless_told_otherwise(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", said.append)
    set_matmul_precision({"accelerator": "cuda"}, "high")
    assert not said, "there is no GPU"
    gpu(monkeypatch)
    for accelerator, precision in (("cpu", "high"), ("cuda", "high"), ("gpu", "highest")):
        set_matmul_precision({"accelerator": accelerator}, precision)
    assert said == ["high", "highest"]


def test_a_run_on_a_gpu_says_its_float32_products_and_that_backends_are_measured(monkeypatch):
    monkeypatch.setattr(core, "resolve_backend", lambda name, *_: "triton" if name == "auto" else name)
    monkeypatch.setattr(device_file, "device_name", lambda device: "A card")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cuda", 0)),
        precision_plugin=Precision(),
        precision="32-true",
        world_size=2,
    )
    line = device_line(trainer, TinyModule(3, moe=core.MoEConfig(4)))
    assert line == (
        f"device 2 x cuda (A card): precision 32-true, float32 products high, threads {torch.get_num_threads()}, "
        "experts by the fastest of triton, grouped and eager"
    )


def use(seconds, steps: int, most: int = 2, chosen: dict[int, float] | None = None):
    """The number of threads of each of ``steps``, which take ``seconds(number, step)``, and what is chosen after."""
    chosen = {} if chosen is None else chosen
    generator = threads_of_steps(most, chosen)
    numbers = [next(generator)]
    for step in range(steps):
        numbers.append(generator.send(seconds(numbers[-1], step)))
    return numbers, chosen


def test_the_faster_number_of_threads_is_chosen_and_fewer_may_take_a_tenth_longer():
    numbers, chosen = use(lambda number, step: {1: 1.0, 2: 5.0}[number], steps=8)
    # Once each untimed, then twice each: five times as long is clear. From the seventh step on it is one.
    assert numbers == [2, 1, 1, 2, 2, 1, 1, 1, 1]
    assert chosen == {2: 5.0, 1: 1.0}
    numbers, chosen = use(lambda number, step: {1: 1.5, 2: 1.0}[number], steps=14)
    assert numbers.count(1) == 6  # once untimed and five times
    assert numbers[12:] == [2, 2, 2]
    assert [*chosen.items()] == [(1, 1.5), (2, 1.0)]
    for one, number in ((1.09, 1), (1.11, 2)):
        assert [*use(lambda n, step, one=one: {1: one, 2: 1.0}[n], steps=12)[1]][-1] == number


def test_rare_long_steps_count_and_short_ones_are_measured_more_often():
    # Two threads: of five timed steps three take 0.5 s and two 4 s, on average 1.9 s. The median would choose them.
    times = iter([0.5, 0.5, 4.0, 0.5, 4.0, 0.5])
    numbers, chosen = use(lambda number, step: 1.0 if number == 1 else next(times), steps=12)
    assert chosen == {2: 1.9, 1: 1.0}
    assert numbers[-1] == 1
    # 20 timed steps each of 1 ms; five each of 0.2 s take more than a second.
    assert [*use(lambda number, step: 0.001, steps=41)[1]] == []
    assert [*use(lambda number, step: 0.001, steps=42)[1]] == [2, 1]
    assert [*use(lambda number, step: 0.2, steps=12)[1]] == [2, 1]


def test_of_many_threads_each_half_is_compared_until_it_is_slower():
    seconds = {8: 4.0, 4: 1.5, 2: 1.0, 1: 1.8}
    numbers, chosen = use(lambda number, step: seconds[number], steps=40, most=8)
    assert [*chosen] == [8, 4, 1, 2]
    assert numbers[-1] == 2


@pytest.mark.parametrize(("slower", "again"), [(2.0, False), (2.1, True)])
def test_it_is_measured_again_when_steps_take_over_twice_as_long(slower, again):
    numbers, chosen = use(lambda number, step: slower, steps=WINDOW + 1, chosen={1: 1.0})
    assert numbers[:WINDOW] == [1] * WINDOW
    assert numbers[WINDOW:] == ([2, 1] if again else [1, 1])
    assert (chosen == {}) == again


def test_a_choice_goes_with_the_steps_that_follow_it():
    # After 6 steps one thread is chosen. Another process goes, and one thread becomes slow: two are chosen in the end.
    def seconds(number: int, step: int) -> float:
        return {1: 1.0, 2: 5.0}[number] if step < 6 else {1: 3.0, 2: 1.0}[number]

    numbers, chosen = use(seconds, steps=6 + WINDOW + 6)
    assert (numbers[6], numbers[-1]) == (1, 2)
    assert chosen == {1: 3.0, 2: 1.0}


@pytest.fixture
def two_cores(monkeypatch):
    """A processor of two cores, whose threads nothing has set."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    monkeypatch.setattr(machine, "cpu_field", lambda name: "")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_what_environment_or_program_have_set_is_taken_as_given(two_cores, monkeypatch, tmp_path):
    trainer = quiet_trainer(tmp_path)
    assert not threads_are_given()
    assert str(Threads(trainer)) == "threads 1 to 2 (measured in the first steps)"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert threads_are_given()
    assert str(Threads(trainer)) == "threads 2"
    monkeypatch.delenv("OMP_NUM_THREADS")
    torch.set_num_threads(3)
    assert threads_are_given()
    assert not Threads(trainer).is_open


def test_mkl_begins_with_a_thread_for_two_logical_cores(two_cores, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {*range(8)})
    monkeypatch.setattr(machine, "cpu_field", {"cpu cores": "16", "siblings": "32"}.get)
    torch.set_num_threads(4)
    assert not threads_are_given()
    torch.set_num_threads(2)
    assert threads_are_given()


def test_only_one_process_on_a_cpu_is_measured_and_a_choice_of_a_larger_machine_is_not_kept(two_cores, tmp_path):
    for kind, size, measured in (("cpu", 1, True), ("cuda", 1, False), ("cpu", 2, False)):
        trainer = SimpleNamespace(world_size=size, strategy=SimpleNamespace(root_device=torch.device(kind)))
        assert Threads(trainer).is_open == measured
    assert Threads(quiet_trainer(tmp_path), checkpoint={"threads": {1: 0.5}}).number == 1
    assert Threads(quiet_trainer(tmp_path), checkpoint={"threads": {4: 0.5}}).is_open


def test_a_given_number_holds_in_the_run_alone(two_cores, tmp_path):
    threads = Threads(quiet_trainer(tmp_path), 1, {"threads": {2: 1.0}})
    assert str(threads) == "threads 1"
    with threads.held():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with pytest.raises(ValueError, match=r"^threads=0 must be at least 1$"):
        Threads(quiet_trainer(tmp_path), 0)


@pytest.fixture
def made_steps(two_cores, monkeypatch):
    """A clock by which a step takes a second with one thread, and five with two; the number of threads of each step."""
    now, used = [0.0], []

    def clock() -> float:
        used.append(torch.get_num_threads())
        now[0] += {1: 1.0, 2: 5.0}[used[-1]]
        return now[0]

    monkeypatch.setattr(threads_file, "time", SimpleNamespace(perf_counter=clock))
    return used


def run(folder, command: str, *words: str, steps: int = 12) -> None:
    config = folder / "config.yaml"
    plain = yaml.safe_load(CONFIG)
    plain["trainer"] |= {"max_steps": steps, "max_epochs": -1}
    config.write_text(yaml.safe_dump(plain))
    assert main([command, "--config", str(config), "--run_dir", str(folder / "run"), *words]) == 0


def test_a_training_chooses_keeps_and_says_its_threads(made_steps, tmp_path, capsys):
    run(tmp_path, "fit")
    said = capsys.readouterr()
    assert "threads 1 to 2 (measured in the first steps)" in said.out
    assert "threads 1 of 2: a step takes 1 s with 1, 5 s with 2" in said.err
    # Each step reads the clock twice. Three steps of the first six have two threads, and all others one.
    assert made_steps == [n for step in (2, 1, 1, 2, 2, 1, *[1] * 6) for n in (step, step)]
    assert torch.get_num_threads() == 2
    kept = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt")["threads"]
    assert kept == {1: 1.0}
    made_steps.clear()
    run(tmp_path, "fit", "--ckpt_path", "last", steps=15)
    assert made_steps == [1] * 6
    run(tmp_path, "test")
    assert capsys.readouterr().out.count("threads 1, experts") == 2


def test_steps_of_several_batches_are_measured_as_one(made_steps, tmp_path):
    run(tmp_path, "fit", "--trainer.accumulate_grad_batches", "3", steps=7)
    assert made_steps == [n for step in (2, 1, 1, 2, 2, 1, 1) for n in (step, step)]


def test_threads_that_are_given_are_not_measured(made_steps, tmp_path, capsys):
    run(tmp_path, "fit", "--threads", "1", steps=2)
    assert made_steps == []
    assert "threads 1, experts" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["threads"] == 1
    assert "threads" not in torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt")


def test_a_comparison_has_one_number_for_its_systems(two_cores, monkeypatch, tmp_path):
    fastest = {"sparse": 1, "dense": 2}
    asked: list[str] = []
    monkeypatch.setattr(training_file, "_fastest", lambda experiment, name: asked.append(name) or fastest[name])
    systems = [SimpleNamespace(name=name, cost=cost, refused="") for name, cost in (("sparse", 1), ("trees", None))]
    free, given = SimpleNamespace(threads=None), SimpleNamespace(threads=1)
    for folder, experiment, jobs, inside in (
        ("a", free, 1, 1),
        ("a", free, 1, 1),
        ("b", free, 2, 2),
        ("a", given, 1, 1),
    ):
        with same_threads(experiment, systems, tmp_path / folder, jobs):
            assert torch.get_num_threads() == inside
        assert torch.get_num_threads() == 2
    assert asked == ["sparse"]  # it is kept, and the runs of folder b share the cores
    with same_threads(free, [*systems, SimpleNamespace(name="dense", cost=1, refused="")], tmp_path / "c"):
        assert torch.get_num_threads() == 2
