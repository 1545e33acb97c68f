"""Checkpoints written tensor by tensor: a run with a sharded one as one file, from which a training goes on."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny_app
import torch
import torch.distributed as dist
import yaml
from commands import fails
from resuming import differences
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing import assert_close

import apps
import core
from apps.base.quiet import quiet
from apps.cli import main
from apps.cli.train import build
from apps.convert.command import write_whole
from apps.convert.runs import write_checkpoint
from apps.train.checkpoint import sharded
from apps.train.checkpoint.contents import read_checkpoint


def fit(folder: Path, run: str, *flags: str) -> None:
    with quiet():
        build("fit", ["--config", str(folder / "config.yaml"), "--run_dir", str(folder / run), *flags]).execute()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run ``sharded`` of one epoch, ``whole`` of two in one process, and their configuration."""
    folder = tmp_path_factory.mktemp("consolidated")
    (folder / "config.yaml").write_text(tiny_app.CONFIG)
    schedule = ["--model.optimizer.schedule=constant", "--model.optimizer.warmup_steps=0", "--model.dropout=0"]
    fit(folder, "whole", "--trainer.max_epochs", "2", *schedule)
    strategy = ["--trainer.strategy", "ExpertParallelStrategy", "--trainer.devices", "1"]
    fit(folder, "sharded", *strategy, *schedule)
    dist.destroy_process_group()
    return folder


def last(run: Path) -> Path:
    return run / "checkpoints" / "last.ckpt"


def steps(run: Path) -> dict[str, float]:
    """Return the losses of a run by their steps."""
    with open(run / "metrics.csv") as file:
        return {row["step"]: float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}


@pytest.fixture(scope="module")
def consolidated(folder: Path) -> Path:
    new = folder / "new"
    words = ["--ckpt_path", str(last(folder / "sharded")), "--output", str(new), "--batches", "0"]
    assert main(["convert", "consolidate", *words]) == 0
    return new


def test_the_file_has_all_that_the_shards_have(folder, consolidated):
    source, new = sharded.read(last(folder / "sharded")), read_checkpoint(last(consolidated))
    assert source.pop("sharded")["world_size"] == 1
    assert differences(source, new) == []
    assert new["optimizer_states"][0]["state"]


def test_the_figures_before_and_after_are_equal(folder, tmp_path, capsys):
    new = tmp_path / "new"
    assert main(["convert", "consolidate", "--ckpt_path", str(folder / "sharded"), "--output", str(new)]) == 0
    rows = [line.rsplit(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    figures = {row[0].strip(): row[1:] for row in rows if len(row) == 3}
    for name in ("weights, MB", "parameters", "active parameters", "MFLOPs an example", "val/loss"):
        before, after = figures[name]
        assert before == after, name
    assert apps.load(new).num_classes == 3
    assert (new / "checkpoints" / "best.ckpt").is_file()


def test_a_training_goes_on_from_it_in_one_process(folder, consolidated, tmp_path):
    config = yaml.safe_load((consolidated / "config.yaml").read_text())
    assert config["run_dir"] == str(consolidated)
    assert [config["trainer"][name] for name in ("strategy", "devices", "num_nodes")] == ["auto", 1, 1]
    with quiet():
        flags = ["--run_dir", str(tmp_path / "on"), "--trainer.max_epochs", "2"]
        build("fit", ["--ckpt_path", str(last(consolidated)), *flags]).execute()
    whole = steps(folder / "whole")
    assert steps(tmp_path / "on") == pytest.approx({step: whole[step] for step in list(whole)[3:]}, rel=1e-5)
    assert main(["test", "--ckpt_path", str(consolidated)]) == 0


def test_what_cannot_be_consolidated_is_refused(folder, consolidated, tmp_path, capsys):
    words = ["convert", "consolidate", "--output", str(tmp_path / "new"), "--batches", "0", "--ckpt_path"]
    path = last(folder / "whole")
    assert fails(capsys, 1, *words, str(path)) == f"{path} is one file already"
    (words[3],) = [str(consolidated)]
    assert "exists: it stays as it is" in fails(capsys, 2, *words, str(folder / "sharded"))
    words[3], cut = str(tmp_path / "new"), shutil.copytree(last(folder / "sharded"), tmp_path / "cut.ckpt")
    (part,) = cut.glob("*/*.distcp")
    part.write_bytes(part.read_bytes()[:100])
    assert f"{part.name} has 100 of" in fails(capsys, 1, *words, str(cut))
    assert not (tmp_path / "new").exists()


@pytest.fixture
def one_rank(tmp_path: Path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_tables_of_torchrec_come_without_the_optimizer(one_rank, tmp_path):
    tables = {f"{sharded.WEIGHT}table": torch.ones(3, 2), f"{sharded.STATE}table/momentum": torch.ones(3)}
    rest = {"state_dict": {"w": torch.zeros(2)}, "hyper_parameters": {"a": 1}, "optimizer_states": [{}], "epoch": 7}
    sharded.write(tmp_path / "last.ckpt", rest, tables)
    write_whole(tmp_path / "new.ckpt", tmp_path / "last.ckpt")
    new = read_checkpoint(tmp_path / "new.ckpt")
    assert {k: v.tolist() for k, v in new["state_dict"].items()} == {"w": [0, 0], "table": [[1, 1]] * 3}
    assert new["converted"] == "consolidate"
    assert new["hyper_parameters"] == {"a": 1}
    assert "optimizer_states" not in new


def test_a_checkpoint_reads_as_it_was_written(tmp_path):
    tied = torch.empty(3)
    layout = {"a": tied, "b": tied, "c": torch.empty(2, dtype=torch.int64)}
    rest = {"encoding": {"mean": torch.tensor([0.5]), "names": ["x"]}, "epoch": 0}
    values = {"a": torch.arange(3.0), "b": torch.arange(3.0), "c": torch.tensor([7, 8])}
    write_checkpoint(tmp_path / "x.ckpt", rest, layout, iter(values.items()))
    checkpoint = read_checkpoint(tmp_path / "x.ckpt")
    assert_close(checkpoint["state_dict"], values)
    assert checkpoint["encoding"] == {"mean": torch.tensor([0.5]), "names": ["x"]}
    state = checkpoint["state_dict"]
    assert state["a"].data_ptr() == state["b"].data_ptr()


def test_a_value_of_another_shape_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a has shape \(3,\), and its place \(2,\)"):
        write_checkpoint(tmp_path / "x.ckpt", {}, {"a": torch.empty(2)}, iter([("a", torch.zeros(3))]))


class Peak:
    """The most memory of this process that is no file's, as it is seen now and then."""

    def __init__(self) -> None:
        self.start = self.most = self.now()

    @staticmethod
    def now() -> int:
        with open("/proc/self/status") as file:
            (line,) = (line for line in file if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    def seen(self, value: Any) -> Any:
        self.most = max(self.most, self.now())
        return value


NUMEL, NAMES = 2 << 20, [f"w{i}" for i in range(4)]  # 8 MiB each


def test_a_sharded_checkpoint_takes_less_than_two_of_its_largest_tensors(one_rank, tmp_path):
    mesh = init_device_mesh("cpu", (1,))
    state = {name: DTensor.from_local(torch.full((NUMEL,), 1.0), mesh, [Shard(0)]) for name in NAMES}
    sharded.write(tmp_path / "last.ckpt", {"state_dict": state}, {})
    del state
    write_whole(tmp_path / "first.ckpt", tmp_path / "last.ckpt")  # what the first call imports stays
    peak, original = Peak(), torch.load
    with mock.patch.object(torch, "load", lambda *args, **options: peak.seen(original(*args, **options))):
        write_whole(tmp_path / "new.ckpt", tmp_path / "last.ckpt")
    assert peak.most - peak.start < 2 * 4 * NUMEL  # a part is often read into memory that the call before has left
    written = read_checkpoint(tmp_path / "new.ckpt")["state_dict"]
    assert all(bool((written[name] == 1).all()) for name in NAMES)


def test_a_mean_takes_less_than_two_of_its_largest_tensors(tmp_path):
    for i in range(2):
        torch.save({"state_dict": {name: torch.full((NUMEL,), float(i)) for name in NAMES}}, tmp_path / f"{i}.ckpt")
    states = [read_checkpoint(tmp_path / f"{i}.ckpt")["state_dict"] for i in range(2)]
    peak = Peak()

    def means():
        for name in NAMES:
            yield name, peak.seen(core.average_states([{name: state[name]} for state in states])[name])

    write_checkpoint(tmp_path / "mean.ckpt", {}, {name: torch.empty(NUMEL) for name in NAMES}, means())
    assert peak.most - peak.start < 2 * 4 * NUMEL
    written = read_checkpoint(tmp_path / "mean.ckpt")["state_dict"]
    assert all(bool((written[name] == 0.5).all()) for name in NAMES)
