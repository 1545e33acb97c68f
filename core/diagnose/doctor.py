"""``diagnose``, and ``Doctor``, which gathers the evidence piece by piece for a training loop or a command."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..contract import Tape, record, unwrapped_modules
from ..convert.read.calls import call, evaluating
from ..layers import MoELayer
from . import rules
from .alike import Inputs
from .figures import LayerFigures
from .finding import Finding
from .foreign import foreign_passes, foreign_routers
from .movement import TrainingStart
from .passes import Facts, Pass, facts_of, of_entry
from .ranks import figures_of_ranks, on_any_rank, on_every_rank, parallel, summed
from .step import Loss, StepFigures, step_figures


class Doctor:
    """The evidence of a model's routing, gathered pass by pass, and its findings.

    Args:
        model: any module with MoE layers, ours or of transformers.
        start: weights that the training began with; None: not known.
        group: the ranks, each with a part of the data: the evidence is the sum over them, so that all of them call
            ``look_at_step`` and ``findings``, which are the same on each. None: all ranks.
        modalities: names of the modalities in ``context.modality_BS``, by number; empty: findings have the numbers.

    Raises:
        ValueError: the model has no MoE layer.

    Example::

        doctor = core.Doctor(model)
        for batch in batches:
            with doctor.watching(batch):
                model(batch)
        print(*doctor.findings(), sep="\\n")
    """

    def __init__(
        self,
        model: nn.Module,
        start: TrainingStart | None = None,
        group: dist.ProcessGroup | None = None,
        modalities: Sequence[str] = (),
    ) -> None:
        self.model, self.start, self.group, self.modalities = model, start, group, tuple(modalities)
        self._layers = {name: m for name, m in unwrapped_modules(model) if isinstance(m, MoELayer)}
        self._foreign = foreign_routers(model)
        if not self._layers and not self._foreign:
            raise ValueError(f"a {type(model).__name__} without MoE layers has no routing to diagnose")
        self._inputs = Inputs(model)
        self._facts: dict[str, Facts] = {}
        self._figures: dict[str, LayerFigures] = {}
        self._of_ranks: dict[str, LayerFigures] = {}
        self._first_levels: dict[str, tuple[float, int]] = {}
        self._steps: dict[str, StepFigures] = {}

    def begin(self) -> None:
        """Forget the passes so far but for the level of their logits, as at the start of a validation."""
        for name, figures in self._figures.items():
            self._first_levels.setdefault(name, (figures.level, figures.num_tokens))
        self._figures, self._of_ranks, self._inputs = {}, {}, Inputs(self.model)

    @contextlib.contextmanager
    def watching(
        self, batch: Any = None, labels: Tensor | None = None, real_BS: Tensor | None = None
    ) -> Iterator[None]:
        """Gather the evidence of the forwards inside the ``with`` block.

        Args:
            batch: the model's input, which tells foreign layers the number of sequences.
            labels: int64 (B,) or (T,), the class of each sequence or token, below 0 for none; None: not known.
            real_BS: bool (B, S), False for padding; None: not known.
        """
        with (
            record(self.model) as tape,
            foreign_passes(self._foreign, batch, real_BS) as passes,
            self._inputs.listening(),
        ):
            yield
        self.add(tape, labels, real_BS)
        for one in passes:
            self._add(one, labels, None)

    def add(self, tape: Tape, labels: Tensor | None = None, real_BS: Tensor | None = None) -> None:
        """Add the passes of a tape. Arguments are as in ``watching``."""
        real_T = None if real_BS is None else real_BS.flatten()
        for entry in tape.entries:
            if entry.name not in self._facts:
                self._facts[entry.name] = self._facts_of(entry.name)
            self._add(of_entry(entry, self._facts[entry.name]), labels, real_T)

    def _add(self, one: Pass, labels: Tensor | None, real_T: Tensor | None) -> None:
        if one.layer not in self._figures:
            self._figures[one.layer] = LayerFigures.like(one)
        self._figures[one.layer].add(one, labels, None if real_T is None else real_T.to(one.chosen_E.device))

    def _facts_of(self, entry: str) -> Facts:
        for name, layer in self._layers.items():
            end = entry.removeprefix(name).lstrip(".") if entry == name or entry.startswith(name) else None
            if end is not None and layer.names_entry(end):
                return facts_of(name, layer, layer.routers().get(end))
        return Facts(entry)

    def look_at_step(self, batch: Any, loss: Loss, aux_weight: float = 1.0, real_BS: Tensor | None = None) -> None:
        """Look into a training step; arguments and errors are as in ``step_figures``."""
        self._steps = step_figures(self.model, batch, loss, aux_weight=aux_weight, real_BS=real_BS, group=self.group)

    def _used(self, figures: LayerFigures) -> Tensor | None:
        """Return the pairs by expert of all routers that choose among the experts of one; None: it is the only one."""
        of_layer = [
            f
            for f in self._of_ranks.values()
            if f.kind == "pairs" and f.facts.layer == figures.facts.layer and f.num_experts == figures.num_experts
        ]
        return torch.stack([f.chosen_E for f in of_layer]).sum(0) if len(of_layer) > 1 else None

    def _first_levels_of_ranks(self) -> dict[str, float]:
        """Return the level of the logits at the first look, by the names of the routers that it saw."""
        names = list(self._of_ranks)
        own = [torch.tensor(self._first_levels.get(name, (0.0, 0)), dtype=torch.float64) for name in names]
        of_ranks = zip(names, (t.tolist() for t in summed(own, self.group)), strict=True)
        return {name: math.sqrt(level / tokens) for name, (level, tokens) in of_ranks if tokens}

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers that were seen since the last ``begin``; after ``findings``, by any rank."""
        return tuple(self._of_ranks or self._figures)

    @property
    def by_data(self) -> frozenset[str]:
        """Those of ``layers`` whose experts the data decide, so that their loads are no fault."""
        return frozenset(name for name, figures in (self._of_ranks or self._figures).items() if figures.facts.by_data)

    def findings(self) -> list[Finding]:
        """Return the findings so far, errors first, in the order of the layers."""
        every: list[Finding] = []
        self._of_ranks = figures_of_ranks(self._figures, self.group)
        first_levels = self._first_levels_of_ranks()
        for name, figures in self._of_ranks.items():
            every += rules.load_findings(name, figures, self._used(figures))
            every += rules.modality_findings(name, figures, self.modalities)
            every += rules.logit_findings(name, figures, first_levels.get(name))
            every += rules.gate_findings(name, figures)
            every += rules.padding_findings(name, figures)
        alike = {
            name: list(rules.alike_findings(name, distance_EE))
            for name, distance_EE in self._inputs.distances(self.group).items()
        }
        every += [finding for of_layer in alike.values() for finding in of_layer]
        for name, step in self._steps.items():
            # Where all experts are the same and gates sum to 1, no gate changes the output: that is one fault.
            are_same = any(finding.severity == "error" for finding in alike.get(name, ()))
            every += [f for f in rules.step_findings(name, step) if not (are_same and f.name == "no_router_gradient")]
        if self.start is not None:
            every += rules.movement_findings(self.start.moved(self.model, self.group))
        return sorted(every, key=lambda finding: finding.severity != "error")


def diagnose(
    model: nn.Module,
    batches: Iterable[Any],
    run: Callable[[nn.Module, Any], Any] | None = None,
    *,
    loss: Loss | None = None,
    labels: Callable[[Any], Tensor | None] | None = None,
    real: Callable[[Any], Tensor | None] | None = None,
    start: TrainingStart | None = None,
    group: dist.ProcessGroup | None = None,
    modalities: Sequence[str] = (),
) -> list[Finding]:
    """Return the problems of a model's routing: an empty list if it has none.

    The model runs in evaluation over the batches, and with ``loss`` in training on the first of them, without an
    update; weights, gradients, buffers, modes and random numbers are unchanged afterwards.
    docs/reference/routers/findings.md has every finding, and the effect of each argument.

    Args:
        model: any module with MoE layers, ours or of transformers.
        batches: a few hundred sequences are enough. Too few tokens raise no finding about loads.
        run: calls the model with a batch; None: ``model(batch)``, ``model(*batch)`` for a tuple or list, and
            ``model(**batch)`` for a mapping.
        loss: takes model and batch, and returns the loss that a training step minimizes, balance losses included; None:
            gradients are not looked at.
        labels: returns the class of each sequence or token of a batch, int64 (B,) or (T,); None: not known.
        real: returns bool (B, S), False for padding; None: the ``attention_mask`` of a mapping, if it has one.
        start: weights that the training began with; None: not known.
        group: the ranks, all of which call this with batches of their own, as many as they have; the evidence is the
            sum over them, and the result the same on each. None: all ranks.
        modalities: names of the modalities in ``context.modality_BS``, by number; empty: findings have the numbers.

    Raises:
        ValueError: the model has no MoE layer, one of the ranks has no batch, or the loss has no gradient.

    Example::

        for finding in core.diagnose(model, loader, lambda model, batch: model(batch["pixels"])):
            print(finding)
    """
    doctor = Doctor(model, start, group, modalities)
    real, rest, together = real or _attention_mask, iter(batches), parallel().needs_all_ranks(model)
    first = batch = next(rest, _NONE)
    if not on_every_rank(first is not _NONE, group):
        raise ValueError("there is no batch to diagnose the model on")
    with torch.no_grad(), evaluating(model):
        while on_any_rank(batch is not _NONE, group) if together else batch is not _NONE:
            if batch is _NONE:  # other ranks have batches left, and need the parameters that are here
                call(model, first, run)
                continue
            with doctor.watching(batch, None if labels is None else labels(batch), real(batch)):
                call(model, batch, run)
            batch = next(rest, _NONE)
    if loss is not None:
        doctor.look_at_step(first, loss, real_BS=real(first))
    with torch.no_grad(), evaluating(model):
        return doctor.findings()


_NONE = object()


def _attention_mask(batch: Any) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
