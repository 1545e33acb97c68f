"""A run's model on its validation data, as ``moesaic validate`` makes both, with a diagnosis of what it does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import core
from apps.base.progress import bar
from apps.cli.trial import build_trial
from apps.doctor.options import Options
from apps.registry import name_of
from apps.train.step.module import SparseModule
from apps.train.watch.doctor import RoutingDoctor
from core.diagnose.alike import experts_of


@dataclass(frozen=True)
class Ablation:
    """The score of a run without each of its experts.

    Attributes:
        metric: name of the score.
        whole: score of the run as it is.
        without: scores by layer, an expert after the other.
        is_loss: whether lower is better.
    """

    metric: str
    whole: float
    without: Mapping[str, tuple[float, ...]]
    is_loss: bool


class Trial:
    """A run on the first batches of its validation data, on the CPU.

    Args:
        checkpoint: the run's checkpoint.
        options: the command line.

    Raises:
        ValueError: the model has no MoE layers, or model or data are refused.
    """

    def __init__(self, checkpoint: Path, options: Options) -> None:
        # The trainer's callbacks belong to the training.
        further = ["--trainer.callbacks=null", *options.rest]
        self._cli = build_trial(checkpoint, options.config, options.batches, further)
        self._model: Any = self._cli.model
        if not core.moe_layers(self._model):
            name = name_of(type(self._model))
            raise ValueError(f"{checkpoint}: its {name} has no MoE layers, and so no routing to look at")
        # The seed of the configuration has made the weights that the training began with. Where it began with others,
        # all weights are far from these, and no rule speaks.
        start = core.TrainingStart(self._model)
        self._doctor = RoutingDoctor(options.batches, classes=True, start=start)

    def findings(self) -> list[core.Finding]:
        """Return the findings; the model is loaded with them."""
        trainer = self._cli.trainer
        trainer.callbacks.append(self._doctor)
        arguments: dict[str, Any] = {"datamodule": self._cli.datamodule, "ckpt_path": str(self._cli.ckpt_path)}
        self._metrics = self._validated(**arguments, weights_only=True)
        trainer.callbacks.remove(self._doctor)
        if isinstance(self._model, SparseModule):
            # Tensors of the trainer's own pass are inference tensors, which have no gradient.
            self._doctor.look_at_step(self._model, next(iter(self._cli.datamodule.val_dataloader())))
        self._doctor.diagnose(self._model)
        return self._doctor.findings

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers that were looked at."""
        assert self._doctor.doctor is not None
        return self._doctor.doctor.layers

    def ablation(self) -> Ablation:
        """Return the score without each expert, on the same batches; ``findings`` has loaded the model.

        Raises:
            ValueError: the model has no experts that can be left out, or logs no score.
        """
        model = self._model
        metric = getattr(model, "monitor", "val/loss")
        if metric not in self._metrics:
            raise ValueError(f"the validation logs no {metric}, and --ablate compares by it")

        number = sum(number for _, number in experts_of(model).values())
        with bar("the score without each expert", number) as shown:

            def score() -> float:
                with shown.weighing(1):
                    return self._validated(datamodule=self._cli.datamodule)[metric]

            without = core.ablate_experts(model, score)
        return Ablation(metric, self._metrics[metric], without, getattr(model, "monitor_mode", "min") == "min")

    def _validated(self, **arguments: Any) -> dict[str, float]:
        (metrics,) = self._cli.trainer.validate(self._model, verbose=False, **arguments)
        return {name: float(value) for name, value in metrics.items()}
