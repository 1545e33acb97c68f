"""Trainings on two gloo ranks with divided experts against one process with the batches of both."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import divided_runs as runs
import pytest
import tiny_app
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
import yaml
from divided_runs import DIVISIONS, curve, divided, fit, loaded, model
from made_once import made_once
from places import environment
from resuming import differences, log
from two_ranks import on_ranks, results

from apps.train.checkpoint import sharded
from apps.train.checkpoint.checkpoints import BestAndLast
from apps.train.checkpoint.contents import read_checkpoint
from apps.train.optim.schedules import ExpertAveraging
from apps.train.step.distilling import DistilConfig
from apps.train.step.growing import GrowConfig

TOLERANCE = 1e-5
FEWER = runs.replaced_experts(2)

KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "average": ({"ema_decay": 0.9}, {}),
    "muon": ({"optimizer": "muon"}, {"gradient_clip_val": 0.01}),
    "rows": ({"optimizer": "row_adam"}, {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}),
}
"""Trainings by their names: options of the model and of the trainer."""
SHARDED, FSDP = "experts, rest sharded", "no experts, rest sharded"
RUNS = [
    *((division, "average") for division in DIVISIONS),
    (FSDP, "muon"),
    *((SHARDED, name) for name in ("muon", "rows", "distilled", "grown", "mean")),
]
LOADS = [(FSDP, "two"), (SHARDED, "one")]
"""Divisions of runs that load the checkpoint of two ranks, or that of one process."""


def taught(folder: Path) -> dict[str, dict[str, Any]]:
    """Options of models that begin with, or learn from, a trained one."""
    return {
        "distilled": {"distil": DistilConfig(str(folder / "one average" / "last.ckpt"), weight=0.5, copy=True)},
        "grown": {"grow": GrowConfig(str(folder / "one fewer" / "last.ckpt"), freeze=False)},
    }


def train_in_one(folder: Path) -> None:
    for name, (options, trainer) in KINDS.items():
        fit(folder / f"one {name}", model(**options), **trainer)
    fit(folder / "one fewer", model(moe=FEWER))
    for name, options in taught(folder).items():
        fit(folder / f"one {name}", model(**options))
    fit(folder / "one mean", model(average_last=2), max_epochs=2, callbacks=[kept(folder / "one mean")])


def kept(folder: Path) -> BestAndLast:
    return BestAndLast(str(folder / "kept"))


def train_on_two(rank: int, folder: Path) -> dict[str, Any]:
    runs.as_rank(rank)
    for division in DIVISIONS:
        for name, (options, trainer) in KINDS.items():
            if (division, name) in RUNS:
                fit(folder / f"{division} {name}", model(**options), divided(division), 2, **trainer)
    for name, options in taught(folder).items():
        fit(folder / f"{SHARDED} {name}", model(**options), divided(SHARDED), 2)
    mean = folder / f"{SHARDED} mean"
    fit(mean, model(average_last=2), divided(SHARDED), 2, max_epochs=2, callbacks=[kept(mean)])
    sources = {"two": folder / "experts average", "one": folder / "one average"}
    for division, name in LOADS:
        loaded(folder / f"{division} of {name}", sources[name] / "last.ckpt", averaged(), divided(division), 2)
    return refusals(folder)


def averaged() -> Any:
    return model(**KINDS["average"][0])


def refusals(folder: Path) -> dict[str, str]:
    def refused(net: Any, **options: Any) -> str:
        return runs.complaint(lambda: fit(folder / "refused", net, divided(SHARDED), 2, **options))

    frozen = GrowConfig(str(folder / "one fewer" / "last.ckpt"))
    other = model(dropout=0.1 * dist.get_rank())
    results = {
        "frozen": refused(model(grow=frozen)),
        "averaged experts": refused(model(), callbacks=[ExpertAveraging()]),
        "another configuration": refused(other),
        "three experts": refused(model(moe=runs.replaced_experts(3))),
    }
    full = mock.patch.object(dcp.FileSystemWriter, "write_data", side_effect=no_space())
    with full if dist.get_rank() == 1 else contextlib.nullcontext():
        results["full disk of a rank"] = refused(model())
    with mock.patch.object(sharded, "replacing", side_effect=no_space()):
        results["full disk at the end"] = refused(model(), max_epochs=2)
    return results


def no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def train_all(folder: Path) -> None:
    (folder / "ranks").mkdir()
    train_in_one(folder)
    work = functools.partial(train_on_two, folder=folder)
    on_ranks(work, folder / "ranks", 2, ["apps.train.sharded.expert_parallel"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on one process and on two."""
    return made_once(tmp_path_factory, "divided_runs", train_all)


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What two ranks return."""
    return results(folder / "ranks", 2)


def tensors(path: Path) -> dict[str, Any]:
    """Return weights, averages and the optimizer's state of a checkpoint."""
    checkpoint = read_checkpoint(path)
    names = ("state_dict", "trained_state_dict", "optimizer_states", "ema_step", "global_step")
    return {name: checkpoint[name] for name in names if name in checkpoint}


def assert_alike(two: Path, one: Path) -> None:
    a, b = tensors(two), tensors(one)
    assert a.keys() == b.keys()
    for name in a.keys() & {"state_dict", "trained_state_dict"}:
        torch.testing.assert_close(dict(a[name]), dict(b[name]), rtol=TOLERANCE, atol=1e-6)


@pytest.mark.parametrize(("division", "name"), RUNS)
def test_two_ranks_train_as_one_process_does(ranks, folder, division, name):
    two, one = folder / f"{division} {name}", folder / f"one {name}"
    expected = curve(one)
    assert len(expected) == (6 if name == "mean" else 3)
    assert curve(two) == pytest.approx(expected, rel=TOLERANCE)
    assert_alike(two / "last.ckpt", one / "last.ckpt")
    assert max(abs(b - a) for a, b in pairwise(expected)) > 1e-3  # the steps would show


@pytest.mark.parametrize("name", ["best.ckpt", "last.ckpt", "average.ckpt"])
def test_checkpoints_in_quick_succession_are_right(ranks, folder, name):
    assert_alike(folder / f"{SHARDED} mean" / "kept" / name, folder / "one mean" / "kept" / name)


@pytest.mark.parametrize(("division", "source"), LOADS)
def test_a_checkpoint_is_the_same_bits_under_another_division(ranks, folder, source, division):
    path = folder / {"two": "experts average", "one": "one average"}[source] / "last.ckpt"
    assert differences(tensors(path), tensors(folder / f"{division} of {source}" / "last.ckpt")) == []


def test_a_sharded_checkpoint_is_the_same_bits_in_one_process(ranks, folder):
    path = folder / "experts average" / "last.ckpt"
    loaded(folder / "alone", path, averaged())
    assert differences(tensors(path), tensors(folder / "alone" / "last.ckpt")) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("frozen", "ValueError: model.grow.freeze=True keeps single experts of a layer as they are"),
        ("averaged experts", "ValueError: ExpertAveraging: the experts of net.3 are of several kinds, or split"),
        ("another configuration", "ValueError: process 1 has another model.dropout than process 0"),
        (
            "three experts",
            "ValueError: layer 'net.3' has 3 experts (FFNExperts), which 2 ranks do not divide; "
            "--trainer.strategy.init_args.expert_parallel_size 1 keeps them whole",
        ),
        ("full disk of a rank", "EveryProcessError: cannot write the checkpoint {folder}/refused/last.ckpt: No space"),
        ("full disk at the end", "EveryProcessError: cannot write the checkpoint {folder}/refused/last.ckpt: No space"),
    ],
)
def test_what_goes_wrong_on_a_rank_is_a_line_on_each(ranks, folder, name, message):
    for rank in ranks:
        assert rank[name].startswith(message.format(folder=folder))
        assert "\n" not in rank[name]


def test_a_lost_rank_ends_the_others_in_a_line(tmp_path):
    processes = mp.start_processes(runs.lose_a_rank, args=(tmp_path,), nprocs=2, start_method="forkserver")
    assert processes is None
    message = (tmp_path / "message").read_text()
    assert message.startswith(
        "LostProcessError: process 0 has lost another one, which ended or did not answer within the timeout of 0:00:04;"
    )
    assert "\n" not in message


def torchrun(run: Path, *flags: str) -> str:
    """Train by the command line on two ranks, which are started once more if one dies; return what they print."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    strategy = ["--trainer.strategy", "ExpertParallelStrategy", "--trainer.devices", "2"]
    done = subprocess.run(
        [sys.executable, *launch, "-m", "apps.cli", "fit", *strategy, "--run_dir", str(run), *flags],
        env=environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_a_killed_rank_is_started_again_and_the_curve_goes_on(tmp_path):
    config = yaml.safe_load(tiny_app.CONFIG)
    config["trainer"] |= {"max_epochs": 3, "callbacks": [{
        "class_path": "divided_runs.DiesOnce", "init_args": {"step": 5, "done": str(tmp_path / "killed")},
    }]}  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    flags = ["--config", str(tmp_path / "config.yaml"), "--data.batch_size", "4", "--ckpt_path", "last"]
    printed = torchrun(tmp_path / "restarted", *flags)
    assert (tmp_path / "killed").exists()  # an unbroken run below dies no more
    assert "last.ckpt yet: starting from the beginning" in printed
    assert "going on from" in printed
    torchrun(tmp_path / "unbroken", *flags)
    assert log(tmp_path / "restarted") == log(tmp_path / "unbroken")
    last = [tmp_path / run / "checkpoints" / "last.ckpt" for run in ("restarted", "unbroken")]
    assert differences(*map(tensors, last)) == []
