"""Sharded checkpoints on one gloo rank: written while the training goes on, and read only when all parts are whole."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from apps.cli.errors import failed
from apps.train.checkpoint import sharded
from apps.train.checkpoint.sharded import BackgroundWriter


@pytest.fixture(autouse=True)
def _one_rank(tmp_path: Path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def contents(value: float) -> dict[str, Any]:
    """Return a checkpoint of a divided weight, two tied plain ones and a list."""
    divided = DTensor.from_local(torch.full((4,), value), init_device_mesh("cpu", (1,)), [Shard(0)])
    tied = torch.full((2,), value)
    return {"state_dict": {"divided": divided, "tied": tied, "also": tied}, "steps": [value], "global_step": int(value)}


def values(path: Path) -> list[float]:
    """Return the number that all tensors and the list of a checkpoint have."""
    checkpoint = sharded.read(path)
    state = checkpoint["state_dict"]
    assert state["tied"].data_ptr() == state["also"].data_ptr()
    return sorted({*state["divided"].tolist(), *state["tied"].tolist(), *checkpoint["steps"]})


class SlowDisk:
    """A disk on which nothing is written before ``go`` is set."""

    def __init__(self) -> None:
        self.go, self.reached, self._write = threading.Event(), threading.Event(), sharded.dcp.save

    def save(self, *args: Any, **kwargs: Any) -> None:
        self.reached.set()
        assert self.go.wait(60)
        self._write(*args, **kwargs)

    def __enter__(self) -> SlowDisk:
        self._patch = mock.patch.object(sharded.dcp, "save", self.save)
        self._patch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.go.set()
        self._patch.stop()


def test_the_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    path, writer, held = tmp_path / "last.ckpt", BackgroundWriter(), contents(1)
    with SlowDisk() as disk:
        writer.write(path, held)
        assert disk.reached.wait(60)
        for tensor in held["state_dict"].values():  # the next steps
            tensor.add_(10)
        held["steps"][0] = 11.0
        assert not sharded.is_sharded(path)
        disk.go.set()
        writer.wait()
    assert values(path) == [1]


def test_a_checkpoint_waits_for_the_one_before(tmp_path):
    best, last, writer = tmp_path / "best.ckpt", tmp_path / "last.ckpt", BackgroundWriter()
    with SlowDisk() as disk:
        writer.write(best, contents(1))
        second = threading.Thread(target=writer.write, args=(last, contents(2)))
        second.start()
        disk.go.set()
        second.join()
        assert values(best) == [1]
        writer.wait()
    assert values(last) == [2]


def test_a_kill_leaves_the_checkpoint_before(tmp_path):
    path, writer = tmp_path / "last.ckpt", BackgroundWriter()
    writer.write(path, contents(1))
    writer.wait()
    with mock.patch.object(sharded.Writing, "_finish", return_value=None):  # nothing after the parts is done
        writer.write(path, contents(2))
        writer.wait()
    assert values(path) == [1]
    assert len(list(path.glob("shards-*"))) == 2
    writer.write(path, contents(3))
    writer.wait()
    assert values(path) == [3]
    assert len(list(path.glob("shards-*"))) == 1


def test_the_file_of_one_process_stays_until_the_folder_is_whole(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"w": torch.ones(1)}}, path)
    with full_disk(), pytest.raises(OSError, match="No space left on device; the earlier one is intact"):
        sharded.write(path, contents(1), {})
    assert torch.load(path, weights_only=True)["state_dict"]["w"] == 1
    sharded.write(path, contents(2), {})
    assert values(path) == [2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "store"]


def full_disk() -> Any:
    return mock.patch.object(sharded, "replacing", side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def test_what_every_process_raises_the_first_one_says(tmp_path, monkeypatch, capsys):
    torn = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    with mock.patch.object(sharded, "replacing", side_effect=torn), pytest.raises(OSError) as caught:
        sharded.write(tmp_path / "last.ckpt", contents(1), {})
    for rank, lines in (
        ("1", ""),
        ("0", f"error: cannot write the checkpoint {tmp_path}/last.ckpt: the disk may be full"),
    ):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert failed(caught.value, False) == 1
        assert capsys.readouterr().err.strip() == lines


def test_a_failure_is_raised_by_the_next_call_and_once(tmp_path):
    path, writer = tmp_path / "last.ckpt", BackgroundWriter()
    writer.write(path, contents(1))
    writer.wait()
    for call in (writer.wait, lambda: writer.write(path, contents(3))):
        with full_disk():
            writer.write(path, contents(2))
            writer._pending.exception()  # it has failed
        with pytest.raises(OSError, match=r"cannot write the checkpoint .*last.ckpt: No space left on device; the ear"):
            call()
        writer.wait()
        assert values(path) == [1]
        assert len(list(path.glob("shards-*"))) == 1


def damage(file: Path, how: str) -> None:
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("pattern", "how", "message"),
    [
        ("*/*.distcp", "missing", r"shards-1-\w+/__0_0.distcp is missing"),
        ("*/*.distcp", "cut", r"shards-1-\w+/__0_0.distcp has [\d,]+ of [\d,]+ bytes"),
        ("*/.metadata", "missing", r"shards-1-\w+/.metadata is missing"),
        ("checkpoint.pt", "cut", "checkpoint.pt"),
    ],
)
def test_a_part_that_is_not_whole_is_named_and_nothing_is_loaded(tmp_path, pattern, how, message):
    path, target = tmp_path / "last.ckpt", contents(0)["state_dict"]["divided"]
    sharded.write(path, contents(1), {})
    (file,) = path.glob(pattern)
    damage(file, how)
    for read in (lambda: sharded.read_placed(path, lambda keys, shape: target), lambda: sharded.read(path)):
        with pytest.raises(ValueError, match=rf"last.ckpt is not a readable checkpoint: .* \({message}\)$"):
            read()
    assert not target.to_local().any()


def test_a_checkpoint_is_read_into_given_tensors(tmp_path):
    path, target = tmp_path / "last.ckpt", contents(0)["state_dict"]["divided"]
    sharded.write(path, contents(1), {})
    assert sharded.read_placed(path, lambda keys, shape: target)["state_dict"]["divided"] is target
    assert target.to_local().tolist() == [1, 1, 1, 1]
