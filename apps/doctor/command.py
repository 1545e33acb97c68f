"""The command ``moesaic doctor``: read the log, look at the model on its validation data, and print the problems."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import core
from apps.base.messages import counted
from apps.base.progress import bar
from apps.base.quiet import quiet
from apps.cli.trial import build_trial
from apps.doctor.options import DoctorOptions
from apps.registry import name_of
from apps.train.checkpoint.loading import load
from apps.train.checkpoint.paths import find_checkpoint, is_hub_folder
from apps.train.step.module import SparseModule
from apps.train.watch.doctor import RoutingDoctor
from apps.train.watch.logs import read_rows
from core.diagnose.alike import experts_of
from core.diagnose.rules import DRIFT, HIGH_LEVEL, LARGE_LOGIT, POLARIZED, drift_finding

FEW = 0.5
"""Load entropy over log E below which a load has collapsed: of 8 experts fewer than 3 are in use, or 2 of 4."""
DROPPED = 0.3
"""Drop rate from which drops are named. The log does not know what chance drops, which is least where tokens are many;
with the model at hand the bar is lower."""
_COLUMN = re.compile(r"(?:(?P<stage>val|train)/)?routing/(?P<layer>[^/]+)/(?P<figure>\w+)")
_GATE = re.compile(r"(?:^|\.)(?:task\d+|tasks|shared)$")


def log_findings(rows: Sequence[Mapping[str, Any]]) -> list[core.Finding]:
    """Return the findings of a log.

    Args:
        rows: those of ``metrics.csv``; a value that a row lacks is empty or missing.
    """
    findings: list[core.Finding] = []
    layers: dict[str, dict[str, list[float]]] = {}
    for column in dict.fromkeys(key for row in rows for key in row):
        match = _COLUMN.fullmatch(column or "")
        if match is None:
            continue
        figures, values = layers.setdefault(match["layer"], {}), series(rows, column)
        # Validation covers more tokens, without noise, and is used instead of training if there is one.
        if values and (match["stage"] == "val" or match["figure"] not in figures):
            figures[match["figure"]] = values
    for layer, figures in layers.items():
        last = {name: values[-1] for name, values in figures.items()}
        findings += _gate(layer, last) if _GATE.search(layer) else _loads(layer, last, figures)
    findings += _level(series(rows, "train/router_z", "train/router_z_loss"))  # the first is its name before 0.1
    return findings


def series(rows: Sequence[Mapping[str, Any]], *columns: str) -> list[float]:
    """Return the numbers of a column, in the order of the rows; and after them those of other columns."""
    values = (row.get(column) for column in columns for row in rows)
    return [float(v) for v in values if v not in (None, "")]


def _loads(layer: str, last: Mapping[str, float], figures: Mapping[str, Sequence[float]]) -> Iterator[core.Finding]:
    entropy, imbalance = last.get("load_entropy", 1.0), last.get("load_imbalance", 1.0)
    dead = figures.get("dead_experts", [0.0])
    balance = "raise the weight of balance.load_balancing_loss, or lower the learning rate"
    if entropy < FEW and imbalance >= 2:
        yield core.Finding(
            "collapsed_load",
            layer,
            "error",
            f"the load's entropy is {entropy:.0%} of an even one's, and an expert has {imbalance:.1f} times the mean",
            balance,
            {"load_entropy": entropy, "load_imbalance": imbalance},
        )
    elif min(dead[-2:]) >= 1 and len(dead) > 1:
        yield core.Finding(
            "dead_experts",
            layer,
            "warning",
            f"{dead[-1]:.0f} experts got no token in the last two looks",
            f"{balance}; or take them away by moesaic convert prune",
            {"dead": dead[-1]},
        )
    if last.get("drop_rate", 0.0) > DROPPED:
        yield core.Finding(
            "drops",
            layer,
            "warning",
            f"{last['drop_rate']:.0%} of the pairs had no room",
            "raise eval_capacity_factor (inf drops none) and capacity_factor, or balance the loads",
            {"drop_rate": last["drop_rate"]},
        )


def _gate(layer: str, last: Mapping[str, float]) -> Iterator[core.Finding]:
    """Yield whether a dense gate gives nearly all to one expert: then the load's entropy is below the entropy of one
    that has ``POLARIZED`` and another that has the rest, over log 2, the least E."""
    bound = -(POLARIZED * math.log(POLARIZED) + (1 - POLARIZED) * math.log(1 - POLARIZED)) / math.log(2)
    entropy = last.get("load_entropy", 1.0)
    if entropy < bound / 2:
        yield core.Finding(
            "polarized_gates",
            layer,
            "warning",
            f"the mean gate's entropy is {entropy:.0%} of an even one's",
            "set expert_dropout to 0.1, a balance loss on the gates, or a lower learning rate of the router",
            {"load_entropy": entropy},
        )


def _level(router_z_loss: Sequence[float]) -> Iterator[core.Finding]:
    """Yield whether the logits have grown: ``router_z_loss`` is the mean square of their logsumexp over all layers."""
    if len(router_z_loss) < 8:
        return
    quarter = len(router_z_loss) // 4
    levels = [math.sqrt(max(v, 0.0)) for v in router_z_loss]
    first, last = sum(levels[:quarter]) / quarter, sum(levels[-quarter:]) / quarter
    if not all(map(math.isfinite, levels)) or last >= LARGE_LOGIT:
        yield core.Finding(
            "logits_overflow",
            "",
            "error",
            f"logsumexp of the logits is {levels[-1]:.3g} (root mean square)",
            "set balance.router_z_loss to 0.001, or lower the router's learning rate (optimizer.router_lr_scale)",
            {"last": levels[-1]},
        )
    elif last > max(HIGH_LEVEL, DRIFT * first):
        yield drift_finding("", first, last)


def begins_elsewhere(arguments: Any) -> bool:
    """Return whether a model's plain arguments name other weights that its training begins with, also a part's."""
    if isinstance(arguments, (list, tuple)):
        return any(map(begins_elsewhere, arguments))
    if not isinstance(arguments, Mapping):
        return False
    distil = arguments.get("distil")
    return (
        any(arguments.get(name) is not None for name in ("pretrained", "encoder_from", "grow"))
        or (isinstance(distil, Mapping) and bool(distil.get("copy")))
        or any(map(begins_elsewhere, arguments.values()))
    )


class DoctorTrial:
    """A run on the first batches of its validation data, on the CPU.

    Args:
        checkpoint: the run's checkpoint.
        options: the command line.

    Raises:
        ValueError: the model has no MoE layers, or model or data are rejected.
    """

    def __init__(self, checkpoint: Path, options: DoctorOptions) -> None:
        # The trainer's callbacks belong to the training.
        further = ["--trainer.callbacks=null", *options.rest]
        self._cli = build_trial(checkpoint, options.config, options.batches, further)
        self._model: Any = self._cli.model
        if not core.moe_layers(self._model):
            name = name_of(type(self._model))
            raise ValueError(f"{checkpoint}: its {name} has no MoE layers, and so no routing to look at")
        # The seed of the configuration has made the weights that the training began with, unless it began with others.
        elsewhere = begins_elsewhere(getattr(self._model, "hparams", {}))
        start = None if elsewhere else core.TrainingStart(self._model)
        self._doctor = RoutingDoctor(options.batches, classes=True, start=start)

    def findings(self) -> list[core.Finding]:
        """Return the findings; the model is loaded with them."""
        trainer = self._cli.trainer
        trainer.callbacks.append(self._doctor)
        arguments: dict[str, Any] = {
            "datamodule": self._cli.datamodule,
            "ckpt_path": self._cli.ckpt_path and str(self._cli.ckpt_path),
        }
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

    @property
    def by_data(self) -> frozenset[str]:
        """Those of them whose experts the data decide."""
        assert self._doctor.doctor is not None
        return self._doctor.doctor.by_data

    @property
    def warnings(self) -> list[str]:
        """Lines on what the data's table may do to the model."""
        lines = getattr(getattr(self._cli.datamodule, "findings", None), "warnings", ())
        return [f"of the table: {line}" for line in lines]

    def ablation(self) -> list[str]:
        """Return lines on the loss in score without each expert, the most costly first; ``findings`` loads the model.

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
        sign, whole = 1 if getattr(model, "monitor_mode", "min") == "min" else -1, self._metrics[metric]
        lines = [f"{metric} {whole:.4g}; what it loses without an expert, the dearest first:"]
        for layer, scores in without.items():
            losses = sorted(((e, sign * (own - whole)) for e, own in enumerate(scores)), key=lambda pair: -pair[1])
            lines.append(f"{layer}: " + ", ".join(f"expert {e} {loss:+.4f}" for e, loss in losses))
        return lines

    def _validated(self, **arguments: Any) -> dict[str, float]:
        (metrics,) = self._cli.trainer.validate(self._model, verbose=False, **arguments)
        return {name: float(value) for name, value in metrics.items()}


LOG, CONFIG = "metrics.csv", "config.yaml"


def run(options: DoctorOptions) -> int:
    """Print a line for each finding, or that there is none.

    Returns:
        0 without findings, 1 with some.

    Raises:
        FileNotFoundError: there is neither a checkpoint nor a log.
        ValueError: the checkpoint is damaged, of another model than the configuration's, or of a dense one.
    """
    if options.data is not None:
        return _drift(options.ckpt_path, options.data)
    folder = options.ckpt_path if options.ckpt_path.is_dir() else options.ckpt_path.parent.parent
    rows = read_rows(folder / LOG)
    checkpoint, note = _checkpoint(options, folder, has_log=bool(rows))
    findings: dict[tuple[str, str], core.Finding] = {(f.name, f.layer): f for f in log_findings(rows)}
    looked_at = [f"{counted(len(rows), 'row')} of {folder / LOG}"] if rows else []
    further: list[str] = []
    if checkpoint is not None:
        with quiet(own_notes=False):
            trial = DoctorTrial(checkpoint, options)
            of_model = trial.findings()
            further = [*(trial.ablation() if options.ablate else ()), *trial.warnings]
        # The model itself knows more than its log.
        findings = {at: f for at, f in findings.items() if f.layer not in trial.by_data}
        findings |= {(f.name, f.layer): f for f in of_model}
        routers = f"{counted(len(trial.layers), 'router')}"
        looked_at.append(f"{routers} on at most {options.batches} validation batches of {checkpoint}")
    if note:
        print(note)
    for finding in findings.values():
        print(finding)
    if checkpoint is not None or not findings:
        print(f"{counted(len(findings), 'finding') if findings else 'healthy'}: {', '.join(looked_at)}")
    for line in further:
        print(line)
    return 1 if findings else 0


def _drift(checkpoint: Path, pattern: str) -> int:
    model: Any = load(checkpoint)
    if not hasattr(model, "drift"):
        raise ValueError(f"data={pattern!r} is for a model of columns, and {name_of(type(model))} is none")
    found = model.drift(pattern)
    whole = counted(len(found), "finding") if found else "no drift"
    print(*found, f"{whole}: {pattern} against the training of {checkpoint}", sep="\n")
    return 1 if found else 0


def _checkpoint(options: DoctorOptions, folder: Path, has_log: bool) -> tuple[Path | None, str]:
    """Return the checkpoint to look at, and a line on why there is none; None: only the log is read.

    Raises:
        FileNotFoundError: there is neither a checkpoint nor a log.
        ValueError: there is a checkpoint without a configuration, and no log.
    """
    if not options.batches:
        if not has_log:
            raise FileNotFoundError(f"--batches 0 reads {folder / LOG} alone, and it has no rows")
        return None, ""
    if is_hub_folder(options.ckpt_path):
        return options.ckpt_path, ""
    try:
        checkpoint = find_checkpoint(options.ckpt_path)
    except FileNotFoundError:
        if not has_log:
            raise
        return None, f"{options.ckpt_path} holds no checkpoint yet: {LOG} alone was read"
    if options.config is None and not (checkpoint.parent.parent / CONFIG).is_file():
        if not has_log:
            raise ValueError(f"no {CONFIG} lies beside {checkpoint}: give --config FILE")
        return None, f"no {CONFIG} lies beside {checkpoint}: {LOG} alone was read"
    return checkpoint, ""
