"""A checkpoint written tensor by tensor is what torch.save writes, and takes the memory of one tensor."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import core
from apps.convert.runs import write_checkpoint
from apps.train.checkpoint.contents import read_checkpoint


def test_it_reads_as_it_was_written(tmp_path):
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


def anonymous_bytes():
    """Return the memory of this process that is no file's."""
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def test_a_mean_takes_less_than_two_of_its_largest_tensors(tmp_path):
    numel, names = 2 << 20, [f"w{i}" for i in range(4)]  # 8 MiB each
    for i in range(2):
        torch.save({"state_dict": {name: torch.full((numel,), float(i)) for name in names}}, tmp_path / f"{i}.ckpt")
    states = [read_checkpoint(tmp_path / f"{i}.ckpt")["state_dict"] for i in range(2)]
    peak = start = anonymous_bytes()

    def means():
        nonlocal peak
        for name in names:
            mean = core.average_states([{name: state[name]} for state in states])[name]
            peak = max(peak, anonymous_bytes())
            yield name, mean
            del mean

    layout = {name: torch.empty(numel) for name in names}
    write_checkpoint(tmp_path / "mean.ckpt", {}, layout, means())
    assert peak - start < 2 * 4 * numel
    written = read_checkpoint(tmp_path / "mean.ckpt")["state_dict"]
    assert all(bool((written[name] == 0.5).all()) for name in names)
