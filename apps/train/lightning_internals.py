"""Undocumented parts of Lightning that the apps use: these functions are the only place that does.

Each docstring says what Lightning lacks in public. All hold for Lightning 2.6;
tests/apps/train/test_lightning_internals.py fails if a new version changes one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.utilities.model_helpers import is_overridden as is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature as is_param_in_hook_signature

# ---- modules


def trainer_of(module: LightningModule) -> Trainer | None:
    """Return a module's trainer, or None without one, for which ``module.trainer`` raises an error."""
    return module._trainer


def set_initial_hparams(module: LightningModule, values: Mapping[str, Any], *, logs: bool) -> None:
    """Set ``module.hparams_initial``, which is read-only, and whether loggers note it."""
    module._hparams_initial, module._log_hyperparams = dict(values), logs


# ---- the loops of a trainer


class ResumedLoop(_FitLoop):
    """Lightning's loop over epochs, which with ``max_steps`` resumes as with ``max_epochs``. A trainer takes no other
    loop in public than its own."""

    def _iteration_based_training(self) -> bool:
        # Lightning would restart *inside* an epoch that the checkpoint has finished, count it twice and leave out a
        # batch.
        return False

    @property
    def done(self) -> bool:
        # Lightning would not restart a validation that was cut after the last step.
        batches = self.epoch_loop.val_loop.batch_progress.current
        return batches.started == batches.processed and super().done


def is_accumulating(trainer: Trainer) -> bool:
    """Return whether the optimizer's step of the last batch is still to come, which no hook is told."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def validates_next(trainer: Trainer) -> bool:
    """Return whether a validation follows this batch, which no hook is told."""
    return trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher)


def rewind_validation(trainer: Trainer) -> None:
    """Make the next checkpoint say that a validation has just begun; no public function changes it."""
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    progress.reset()
    progress.increment_ready()
    progress.increment_started()


def prepare_for_fsdp(trainer: Trainer) -> None:
    """Make a trainer evaluate under ``no_grad``, since FSDP2 fails in torch's inference mode, and quieten FSDP2.
    ``Trainer(inference_mode=False)`` would come before the strategy."""
    for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
        loop.inference_mode = False
    # Nothing here changes an output of a module in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")


def set_received_sigterm(trainer: Trainer, received: bool) -> None:
    """Set ``trainer.received_sigterm``, which is read-only."""
    trainer._signal_connector.received_sigterm = received


# ---- optimizers and strategies

handles_unscaling = _optimizer_handles_unscaling
"""Return whether an optimizer unscales the gradients in its own step; in public only Lightning's error tells."""


def needs_no_unscaling(optimizer: Any) -> None:
    """Let Lightning clip the gradients of a fused optimizer under bf16, which has no scales; it rejects all fused."""
    optimizer._step_supports_amp_scaling = False


def begin_processes(strategy: Any, build_mesh: Callable[[], Any]) -> None:
    """Start the processes of a ``ModelParallelStrategy`` on another mesh than its own, which it always builds."""
    strategy._setup_distributed()
    strategy._device_mesh = strategy.lightning_module._device_mesh = build_mesh()


def step_by_call(strategy: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """Run a step of the module by the module's call, so that the hooks of FSDP2 run; Lightning does so for DDP only."""
    return strategy._forward_redirection(strategy.model, strategy.lightning_module, name, *args, **kwargs)


def set_module(strategy: Any, module: LightningModule | None) -> None:
    """Set the module of a strategy, and nothing else; ``connect`` would replace the wrapped model too."""
    strategy._lightning_module = module


# ---- the progress bar


def of_epochs(trainer: Trainer) -> str:
    """Return "/N" for a training of N epochs, "" if they have no limit."""
    return f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""


class ErasedProgressBar(RichProgressBar):
    """Lightning's bar, erased at the end, which ``leave=False`` does not do, and with epochs counted from 1."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_progress()

    def _init_progress(self, trainer: Trainer) -> None:
        super()._init_progress(trainer)
        if self.progress is not None:
            self.progress.live.transient = True

    def _get_train_description(self, current_epoch: int) -> str:
        return f"epoch {current_epoch + 1}{of_epochs(self.trainer)}"
