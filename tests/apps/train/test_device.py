"""The device and the precision of a training where its configuration leaves them open."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision, Precision
from quiet_trainer import quiet_trainer
from tiny_app import TinyModule

import core
from apps.train import device as device_file
from apps.train.device import device_line, device_options, set_matmul_precision


def gpu(monkeypatch, has_bfloat16: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bfloat16)


def test_without_a_gpu_the_processor_trains_in_float32():
    # No precision: Lightning's default is 32-true.
    assert device_options({"accelerator": "auto", "precision": None}) == {"accelerator": "cpu"}


def test_a_gpu_is_taken_with_the_precision_that_it_has(monkeypatch):
    gpu(monkeypatch)
    assert device_options({}) == {"accelerator": "cuda", "precision": "bf16-mixed"}
    assert device_options({"accelerator": "gpu"}) == {"accelerator": "gpu", "precision": "bf16-mixed"}
    gpu(monkeypatch, has_bfloat16=False)
    assert device_options({}) == {"accelerator": "cuda"}


def test_what_is_named_is_kept(monkeypatch):
    gpu(monkeypatch)
    assert device_options({"accelerator": "cpu"}) == {"accelerator": "cpu"}
    assert device_options({"precision": "32-true"}) == {"accelerator": "cuda"}
    # Lightning takes a plugin or a name, not both.
    assert device_options({"plugins": [MixedPrecision("bf16-mixed", "cpu")]}) == {"accelerator": "cuda"}


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
