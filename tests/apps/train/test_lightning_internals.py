"""The private parts of Lightning that the apps use do what they need; a version that changes one fails here."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from quiet_trainer import quiet_trainer
from torch.utils.data import DataLoader

from apps.train import lightning_internals as internals


class Line(LightningModule):
    """y = w x, on six examples of one number."""

    def __init__(self, size: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.net = torch.nn.Linear(size, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self(batch).mean()

    def validation_step(self, batch: torch.Tensor) -> None:
        self.inferring = torch.is_inference_mode_enabled()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.ones(6, 1))  # type: ignore[arg-type]

    val_dataloader = train_dataloader


class Noted(Callback):
    """Notes after each batch what the functions say."""

    def __init__(self) -> None:
        self.accumulates: list[bool] = []
        self.validates: list[bool] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.accumulates.append(internals.is_accumulating(trainer))
        self.validates.append(internals.validates_next(trainer))


class Remembers(Logger):
    """Keeps the hyper-parameters that it is given."""

    name = version = ""  # type: ignore[assignment]
    params: Any = None

    def log_hyperparams(self, params: Any, *_: Any) -> None:
        self.params = params

    def log_metrics(self, *_: Any) -> None:
        pass


def trainer(tmp_path: Path, *callbacks: Callback, **options: Any) -> Trainer:
    return quiet_trainer(tmp_path, callbacks=list(callbacks), **{"max_epochs": 1, "num_sanity_val_steps": 0, **options})


def test_a_module_has_its_trainer_or_none_and_a_logger_gets_the_initial_hyper_parameters(tmp_path):
    module, runs = Line(), trainer(tmp_path)
    assert internals.trainer_of(module) is None
    runs.fit(module)
    assert internals.trainer_of(module) is runs
    module = Line()
    assert module.hparams_initial == {"size": 1}
    for logs in (False, True):
        internals.set_initial_hparams(module, {"size": 2}, logs=logs)
        assert module.hparams_initial == {"size": 2}
        runs = trainer(tmp_path, logger=(logger := Remembers()))
        runs.fit(module)
        assert logger.params == ({"size": 2} if logs else None)


def test_the_last_batch_of_an_accumulation_and_those_before_a_validation_are_known(tmp_path):
    noted = Noted()
    trainer(tmp_path, noted, accumulate_grad_batches=2, val_check_interval=3).fit(Line())
    assert noted.accumulates == [True, False, True, False, True, False]
    assert noted.validates == [False, False, True, False, False, True]


def test_the_loop_does_not_restart_inside_an_epoch_that_has_ended(tmp_path):
    loop = trainer(tmp_path, max_epochs=-1, max_steps=12).fit_loop
    loop.restarting = True
    assert loop.restarting  # Lightning's own does
    loop.__class__ = internals.ResumedLoop
    loop.restarting = True
    assert not loop.restarting
    loop.epoch_progress.current.ready = 1
    loop.restarting = True
    assert loop.restarting


def test_a_rewound_validation_begins_again(tmp_path):
    class Rewinds(Callback):
        def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
            internals.rewind_validation(trainer)
            trainer.save_checkpoint(os.path.join(trainer.default_root_dir, "a.ckpt"))

    runs = trainer(tmp_path, Rewinds())
    runs.fit(Line())
    state = torch.load(tmp_path / "a.ckpt", weights_only=False)["loops"]["fit_loop"]
    progress = state["epoch_loop.val_loop.batch_progress"]["current"]
    assert progress == {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    runs.fit_loop.__class__ = internals.ResumedLoop
    assert not runs.fit_loop.done
    runs.fit_loop.epoch_loop.val_loop.batch_progress.reset()
    assert runs.fit_loop.done


@pytest.mark.parametrize("prepared", [False, True])
def test_a_prepared_trainer_evaluates_without_inference_mode(tmp_path, prepared):
    for run in ("fit", "validate"):
        module, runs = Line(), trainer(tmp_path)
        if prepared:
            internals.prepare_for_fsdp(runs)
        getattr(runs, run)(module)
        assert module.inferring is (run == "validate" and not prepared)  # fit has no inference mode anyway


def test_a_signal_is_received_and_forgotten(tmp_path):
    class Signals(Callback):
        seen: list[bool] = []

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if not self.seen:
                os.kill(os.getpid(), signal.SIGTERM)
                self.seen.append(trainer.received_sigterm)
                internals.set_received_sigterm(trainer, False)
                self.seen.append(trainer.received_sigterm)

    runs = trainer(tmp_path, signals := Signals())
    runs.fit(Line())  # it would end with an exception
    assert signals.seen == [True, False]
    assert runs.global_step == 6


def test_a_fused_optimizer_handles_unscaling_until_it_is_told_otherwise():
    module = Line()
    fused = torch.optim.AdamW(module.parameters(), fused=True)
    assert internals.handles_unscaling(fused)
    internals.needs_no_unscaling(fused)
    assert not internals.handles_unscaling(fused)
    assert not internals.handles_unscaling(torch.optim.SGD(module.parameters()))


def test_a_strategy_has_its_module_begins_processes_before_a_mesh_and_steps_by_the_module_s_call(monkeypatch):
    strategy, module, other = DDPStrategy(), Line(), Line()
    strategy.connect(module)
    internals.set_module(strategy, None)
    assert strategy.lightning_module is None
    assert strategy.model is module
    internals.set_module(strategy, other)
    assert strategy.lightning_module is other
    strategy, module, calls = ModelParallelStrategy(), Line(), []
    strategy.connect(module)
    monkeypatch.setattr(strategy, "_setup_distributed", lambda: calls.append("processes"))
    internals.begin_processes(strategy, lambda: calls.append("mesh") or "the mesh")
    assert calls == ["processes", "mesh"]
    assert strategy.device_mesh == module.device_mesh == "the mesh"
    strategy, module, calls = ModelParallelStrategy(), Line(), []
    strategy.connect(module)
    module.register_forward_pre_hook(lambda *_: calls.append("hook"))
    out = internals.step_by_call(strategy, "training_step", torch.ones(1, 1), 0)
    assert calls[0] == "hook"
    assert out == module(torch.ones(1, 1)).mean()


def test_the_bar_is_erased_and_counts_epochs_from_1(tmp_path):
    bar = internals.ErasedProgressBar()
    runs = trainer(tmp_path, bar, enable_progress_bar=True, max_epochs=2)
    seen = []

    class Looks(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append((bar.progress.live.transient, bar.progress.tasks[0].description))

    runs.callbacks.append(Looks())
    runs.fit(Line())
    assert seen[0] == (True, "epoch 1/2")
    assert bar.progress.finished
    assert not bar.progress.live.is_started
    assert isinstance(bar, RichProgressBar)


def test_steps_and_hooks_are_told_apart():
    assert internals.is_overridden("training_step", Line())
    assert not internals.is_overridden("configure_callbacks", Line())
    assert internals.is_param_in_hook_signature(Line.training_step, "batch_idx", min_args=2)
    assert not internals.is_param_in_hook_signature(Line.validation_step, "batch_idx", min_args=2)
