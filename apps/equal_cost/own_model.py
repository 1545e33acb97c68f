"""``OwnModel`` answers a comparison for a LightningModule of the user's own, which knows nothing of comparisons.

FLOPs and speed are measured on the module's own steps, run without a trainer: ``validation_step`` for a forward,
``training_step`` for a step. Their logs are then discarded.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

import core
from apps.equal_cost.comparison import Baseline, Comparison, adopted_twins
from apps.train.lightning_internals import is_param_in_hook_signature, trainer_of
from apps.train.sparsified import SparsifiedModule, SparsifyConfig, adopt, sparsified
from apps.train.step.module import TaskOutput, TrainingLoss
from core.convert import matching_parts


@dataclass(frozen=True)
class CountedBatch:
    """A batch, and its number of examples as its length."""

    batch: Any
    num_examples: int

    def __len__(self) -> int:
        return self.num_examples


class OwnModel:
    """A module made sparse, or its matched dense baseline, as a comparison sees it.

    Args:
        module: the module, with what ``apps.train.sparsified.adopt`` adds.
        dense: the module that it was made of.

    Attributes:
        monitor, monitor_mode: the metric that is compared, in validation, and "max" or "min".
        average_last, shown_metrics, metric_signatures: a user's module has none of these.

    Raises:
        ValueError: the section does not name the metric, or the module has no step that is needed.
    """

    average_last: int | None = None
    shown_metrics: tuple[str, ...] = ()
    metric_signatures: Mapping[str, str] = {}

    def __init__(self, module: SparsifiedModule, dense: LightningModule) -> None:
        self.module, self.dense, self.section = module, dense, module.sparsify_config
        name = type(module).__name__
        for step in ("training_step", "validation_step", "test_step"):
            if not hasattr(getattr(type(module), step), "__wrapped__"):
                raise ValueError(f"{name} has no {step}, which a comparison needs")
        monitor = getattr(module, "monitor", None)
        if not isinstance(monitor, str):
            raise ValueError("sparsify.metric is missing: the name under which validation logs it")
        self.monitor = monitor
        self.monitor_mode: Literal["min", "max"] = module.monitor_mode  # type: ignore[assignment]

    @property
    def comparison(self) -> OwnComparison:
        """The model as a comparison sees it."""
        return OwnComparison(self)

    @property
    def test_monitor(self) -> str:
        if self.section.test_metric is not None:
            return self.section.test_metric
        for start in ("validation", "valid", "val"):
            if self.monitor.startswith(start):
                return f"test{self.monitor.removeprefix(start)}"
        return self.monitor

    # ---- costs

    def example_inputs(self, batch: Any) -> tuple[Any, ...]:
        """Return what ``__call__`` takes of a batch."""
        return (CountedBatch(batch, num_examples(batch, self.section.examples)),)

    cost_inputs = example_inputs

    def cost_unit(self, batch: Any) -> str:
        return "an example"

    def __call__(self, counted: CountedBatch) -> None:
        """Run the forward of an evaluation."""
        self._run("validation_step", counted.batch)

    def training_loss(self, batch: Any) -> TrainingLoss:
        """Return the loss that a step of ``batch`` minimizes; see ``SparseModule.training_loss``.

        Raises:
            ValueError: the step returns no loss.
        """
        with core.record(self.module) as tape:
            result = self._run("training_step", batch)
        loss = result.get("loss") if isinstance(result, Mapping) else result
        if not isinstance(loss, Tensor):
            raise ValueError(f"training_step of {type(self.module).__name__} returns {loss!r}, and no loss to measure")
        aux = core.aux_losses(tape)
        out = TaskOutput(loss, None, None, num_examples(batch, self.section.examples))
        return TrainingLoss(self.module.balance.total(loss, aux, tape), out, aux, tape)

    def _run(self, name: str, batch: Any) -> Any:
        """Return the result of the user's own step, without a trainer."""
        step = getattr(type(self.module), name).__wrapped__
        takes_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*self.log().*|.*self.trainer.*")
                return step(self.module, batch, *((0,) if takes_index else ()))
        except (AttributeError, RuntimeError) as error:
            if trainer_of(self.module) is None and "rainer" in str(error):
                raise ValueError(
                    f"{name} of {type(self.module).__name__} needs a trainer, and a comparison counts FLOPs and "
                    f"measures speed without one: {error}"
                ) from error
            raise

    def configure_optimizers(self, trainer: Trainer) -> Any:
        """Return the result of the module's own method, which may ask a trainer that does not run.

        Raises:
            ValueError: it needs one that runs.
        """
        self.module.trainer = trainer
        try:
            return self.module.configure_optimizers()
        except (AttributeError, RuntimeError) as error:
            raise ValueError(
                f"configure_optimizers of {type(self.module).__name__} needs a trainer that runs, and speed is "
                f"measured without one ({error}): give --rounds 0"
            ) from error
        finally:
            self.module.trainer = None  # ``self.log`` of a step would ask it


class OwnComparison(Comparison):
    """The answers of an ``OwnModel`` to a comparison.

    Args:
        model: the model.
    """

    def __init__(self, model: OwnModel) -> None:
        super().__init__(model.module)
        self.model = model

    @property
    def moe_block_names(self) -> tuple[str, ...]:
        return tuple(matching_parts(self.model.dense, self.model.section.modules))

    def baselines(self) -> Mapping[str, Baseline]:
        """Return the module with wider networks instead of experts, and nothing else changed."""
        return adopted_twins(self.model.dense, self.module, partial(Twin, self.model))


@dataclass(frozen=True)
class Twin:
    """Makes the matched dense baseline of a sparse model; unlike a closure, it pickles.

    Attributes:
        sparse: the sparse model.
        cost: what is equal, "flops" or "params".
    """

    sparse: OwnModel
    cost: Literal["flops", "params"]

    def __call__(self) -> OwnModel:
        dense, module = self.sparse.dense, self.sparse.module
        twin = core.dense_twin(dense, like=module, cost=self.cost, seed=int(torch.randint(2**31, ())))
        assert isinstance(twin, LightningModule)
        return OwnModel(adopt(twin, module.sparsify_config), dense)


def own_model(module: LightningModule, section: SparsifyConfig) -> OwnModel:
    """Return the sparse model of a user's module, for a comparison.

    Raises:
        ValueError: as ``sparsified`` and ``OwnModel``.
    """
    return OwnModel(sparsified(module, section), module)


def num_examples(batch: Any, part: str | int | None = None) -> int:
    """Return the number of examples in a batch.

    Args:
        batch: a batch of a data module.
        part: key, index or attribute whose length, or value, the number is; None: all tensors have this length.

    Raises:
        ValueError: the part does not exist, or the tensors of the batch have several lengths, or it has none.
    """
    if part is None:
        lengths = sorted({len(tensor) for tensor in _tensors(batch) if tensor.ndim})
        if len(lengths) == 1:
            return lengths[0]
        shown = f"tensors of lengths {', '.join(map(str, lengths))}" if lengths else "no tensor to count by"
        raise ValueError(
            f"sparsify.examples is missing: a batch is a {type(batch).__name__} with {shown}; give the key, index or "
            "attribute whose length or value is the number of examples"
        )
    try:
        value = batch[part] if hasattr(batch, "__getitem__") else getattr(batch, str(part))
        return value if isinstance(value, int) else len(value)
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        kind = type(batch).__name__
        raise ValueError(
            f"sparsify.examples={part!r} is no part of a batch with a length: the batch is a {kind}"
        ) from error


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ():
        yield from _tensors(inner)
