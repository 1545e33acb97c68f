"""Which errors mean that another process was lost, and when processes meet by names of their own."""

from __future__ import annotations

from datetime import timedelta
from unittest import mock

import pytest
import torch.distributed as dist

from apps.train.sharded.processes import is_loss, join_again
from apps.train.torch_internals import limit_waiting

STALE = "default_pg/0//cpu//0/rank_0"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[/pytorch/third_party/gloo/transport/tcp/pair.cc:1] Connection closed by peer [::1]:1"), True),
        (RuntimeError("[.../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 4000ms for recv"), True),
        (dist.DistBackendError("NCCL error: remote process exited or there was a network error"), True),
        (dist.DistNetworkError("failed to recv, got 0 bytes. Connection was likely closed."), True),
        (dist.DistNetworkError("failed to listen on port 29500: EADDRINUSE, address already in use"), False),
        (RuntimeError("DataLoader timed out after 10 seconds"), False),
        (RuntimeError("[enforce fail at gloo/allreduce.h:1] sizes differ"), False),
        (ValueError("gloo timeout"), False),
    ],
)
def test_errors_of_a_lost_process(error, expected):
    assert is_loss(error) == expected


@pytest.fixture
def started_again(tmp_path, monkeypatch):
    """What torchrun says to a process of one machine that it has started for the second time."""
    server = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    server.set(STALE, "the address of a dead process")
    values = {"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_WORLD_SIZE": "1"}
    for name, value in {**values, "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    yield server
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_second_start_has_names_of_its_own(started_again):
    join_again("gloo", None)
    assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
    keys = [key for key in started_again.list_keys() if key != STALE]
    assert keys
    assert all(key.startswith("start1/") for key in keys)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TORCHELASTIC_RESTART_COUNT", "0"),
        ("TORCHELASTIC_USE_AGENT_STORE", "False"),  # the store is new
        ("GROUP_WORLD_SIZE", "2"),  # the machines may count otherwise
    ],
)
def test_other_starts_are_left_alone(started_again, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    join_again("gloo", None)
    assert not dist.is_initialized()


def test_every_group_waits_as_long(started_again):
    join_again("gloo", None)
    other = dist.new_group(backend="gloo")
    with mock.patch.object(dist.distributed_c10d, "_set_pg_timeout") as limit:
        limit_waiting(timedelta(seconds=3))
    assert {call.args for call in limit.call_args_list} >= {
        (timedelta(seconds=3), g) for g in (dist.group.WORLD, other)
    }
