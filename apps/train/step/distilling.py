"""Distillation (Switch, arXiv 2101.03961, section 4.2): a training also learns from a trained model's predictions."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

import core
from apps.base.messages import excerpt
from apps.train.checkpoint.contents import check_class, read_checkpoint
from apps.train.checkpoint.linked import LinkedModule
from apps.train.checkpoint.paths import find_checkpoint
from apps.train.step.growing import GrowConfig
from core.fields import Checked, Positive, Share

_logger = logging.getLogger(__name__)


@core.register_config
@dataclass(frozen=True)
class DistilConfig(Checked):
    """The trained model whose predictions a run learns in addition to the labels.

    The loss is ``(1 - weight) label_loss + weight T^2 KL(teacher || student)``, both predictions at the temperature T:
    ``softmax(logits / T)``. Validation and test use only the labels' loss.

    Attributes:
        teacher: a run's folder or a checkpoint, as ``find_checkpoint`` takes it, of a model of the same class. A
            training that is resumed needs it too; a test does not.
        weight: the teacher's share of the loss, in [0, 1]; the labels have the rest. Switch has 0.25.
        temperature: T; above 1 the teacher's small probabilities count more. ``T^2`` keeps the size of the gradient
            (arXiv 1503.02531).
        copy: a run that does not resume starts with the teacher's tensors outside the MoE layers that have the same
            name and shape, as Switch does.

    Raises:
        ValueError: a value out of its range.
    """

    prefix = "distil."

    teacher: str
    weight: Share = 0.25
    temperature: Positive = 1.0
    copy: bool = False


class Distribution(Protocol):
    """A model's predictions for the targets of a batch, as logits."""

    def divergence(self, teacher: Self, temperature: float) -> Tensor:
        """Return ``KL(teacher || self)``, (), the mean over the targets, of both at a temperature."""
        ...


@dataclass(frozen=True)
class ClassLogits:
    """The logits of one class of C for each of N targets.

    Attributes:
        logits_NC: (N, C).
    """

    logits_NC: Tensor

    def divergence(self, teacher: ClassLogits, temperature: float) -> Tensor:
        """Return the mean over the N targets of ``sum_c p_c log(p_c / q_c)``, p the teacher's shares and q these."""
        own, given = ((part.logits_NC / temperature).log_softmax(-1) for part in (self, teacher))
        return F.kl_div(own, given, reduction="batchmean", log_target=True)


class Teacher:
    """A trained model next to the one that it teaches, but not a part of it: no checkpoint and no optimizer has it.

    Args:
        module: the model that learns. It takes over the encoding of the teacher's data, so that both read the same
            numbers.
        config: location of the teacher, and how much it counts.

    Attributes:
        model: the teacher, in evaluation.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        ValueError: it belongs to a model of another class, or to other classes, subwords, items or tasks, the data do
            not fit its encoding, or ``copy`` finds no tensor.
    """

    def __init__(self, module: LinkedModule, config: DistilConfig) -> None:
        file = find_checkpoint(config.teacher)
        path, checkpoint = str(file), read_checkpoint(file)
        check_class(checkpoint, module, f"model.distil.teacher={path}")
        model: Any = type(module).restored(checkpoint, path)
        for name in module.data_arguments:
            if getattr(model, name) != getattr(module, name):
                place, there, here = _difference(name, getattr(model, name), getattr(module, name))
                raise ValueError(
                    f"model.distil.teacher={path} predicts other targets: its {place} is {excerpt(there)}, and this "
                    f"run's is {excerpt(here)}"
                )
        _share_encoding(module, checkpoint, path)
        self.config, self.model = config, model.eval().requires_grad_(False)
        if config.copy and module.starts_afresh:
            _copy_dense(module, model, path)

    def divergence(self, student: Distribution, batch: Any) -> Tensor:
        """Return ``T^2 KL(teacher || student)`` of a batch, (); the teacher gets no gradient."""
        with torch.no_grad():
            taught: Distribution = self.model.distribution(batch)
        return self.config.temperature**2 * student.divergence(taught, self.config.temperature)


def _difference(name: str, there: Any, here: Any) -> tuple[str, Any, Any]:
    """Return where two values that differ do so first, with both values there."""
    if hasattr(there, "digest") and hasattr(here, "digest"):
        return f"{name}.digest", there.digest, here.digest
    if is_dataclass(there) and type(there) is type(here):
        parts = [(f"{name}.{f.name}", getattr(there, f.name), getattr(here, f.name)) for f in fields(there)]
    elif isinstance(there, tuple) and isinstance(here, tuple) and len(there) == len(here):
        parts = [(f"{name}.{i}", a, b) for i, (a, b) in enumerate(zip(there, here, strict=True))]
    else:
        return name, there, here
    return _difference(*next(part for part in parts if part[1] != part[2]))


def _share_encoding(module: LinkedModule, checkpoint: Any, path: str) -> None:
    """Give the data the teacher's encoding, or raise an error if a checkpoint of this run set another one."""
    state, data, own = checkpoint.get("encoding"), module._data(), module._encoding
    if own is None:
        module.adopt_encoding(checkpoint)
    elif state is not None and hasattr(data, "encoding_of") and data.encoding_of(state) != data.encoding_of(own):
        raise ValueError(f"model.distil.teacher={path} is of data that are encoded otherwise than this run's")


@torch.no_grad()
def _copy_dense(module: LinkedModule, teacher: LinkedModule, path: str) -> None:
    """Copy the teacher's tensors outside the MoE layers of both."""
    sparse = tuple(f"{name}." for part in (module, teacher) for name in core.moe_layers(part))
    own, given = ({k: v for k, v in part.state_dict().items() if isinstance(v, Tensor)} for part in (module, teacher))
    dense = [name for name in own if not name.startswith(sparse)]
    same = [name for name in dense if name in given and given[name].shape == own[name].shape]
    if not same:
        raise ValueError(f"model.distil.copy: no tensor outside the MoE layers has a name and shape of {path}")
    for name in same:
        own[name].copy_(given[name])
    _logger.info("%d of the %d tensors outside the MoE layers are those of %s", len(same), len(dense), path)


def check_one_start(pretrained: str | None, grow: GrowConfig | None, distil: DistilConfig | None) -> None:
    """Raise an error if published weights are set for a training that already starts from another model's.

    Raises:
        ValueError: naming both.
    """
    other = "grow" if grow is not None else "distil.copy=True" if distil is not None and distil.copy else None
    if pretrained is not None and other is not None:
        raise ValueError(f"pretrained={pretrained!r} with {other}: a training begins with the weights of one model")
