"""An experiment makes models, data and trainer options of a configuration as often as a comparison needs them."""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ProgressBar, Timer

from apps import registry
from apps.cli.classes import with_short_names
from apps.cli.configs import at
from apps.cli.errors import UsageError
from apps.cli.request import Request
from apps.cli.sections import Sections
from apps.cli.setup import check_links, train_as_given
from apps.compare.systems import SPARSE, candidates
from apps.equal_cost.own_model import OwnModel, own_model
from apps.train.device import device_options, set_matmul_precision
from apps.train.optim.chosen import SECTIONS
from apps.train.step.module import SparseModule

# Trainer options that a comparison sets itself.
_OWN = ("callbacks", "logger", "default_root_dir", "plugins", "enable_progress_bar", "enable_model_summary",
        "enable_checkpointing", "num_sanity_val_steps", "fast_dev_run", "devices", "num_nodes")  # fmt: skip
_ROUTERS = "--routers="
BY_LOSS = "--by_loss"
"""An argument of an ``Experiment`` whose models are judged by their loss, whatever they monitor."""


class Still(Trainer):
    """A trainer that does not run. It tells how many steps it would take, and opens no loader for that, as Lightning's
    own does."""

    @property
    def train_dataloader(self) -> Any:
        return None if self.datamodule is None else self.datamodule.train_dataloader()

    @property
    def num_training_batches(self) -> float:
        length, limit = length_of(self.train_dataloader), self.limit_train_batches
        if isinstance(limit, int):
            return min(length, limit)
        return length if math.isinf(length) else int(length * limit)


class Experiment:
    """A sparse model's configuration.

    Args:
        arguments: arguments as after ``moesaic fit``: ``--config FILE``, again for overlays, and
            ``--KEY.SUBKEY VALUE``. ``--routers=NAME``, again for each, are the overlays whose routers are compared too,
            and ``BY_LOSS`` stands for itself. They are plain strings, so that another process can read the same
            configuration.

    Raises:
        UsageError: a wrong option or configuration.
        ValueError: a value that the model or the data rejects.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self.arguments = tuple(arguments)
        self.routers = tuple(a.removeprefix(_ROUTERS) for a in arguments if a.startswith(_ROUTERS))
        self.by_loss = BY_LOSS in arguments
        request = Request.read("fit", [a for a in arguments if not a.startswith(_ROUTERS) and a != BY_LOSS])
        if request.checkpoint is not None:
            raise UsageError(f"--ckpt_path {request.checkpoint}: a comparison trains every model from its start")
        if self.routers and request.sparsifies:
            raise UsageError(
                f"--routers {self.routers[0]}: routers are compared in the suite's own models; with sparsify, give a "
                "configuration for each"
            )
        if request.model_class is not None and not request.sparsifies:
            if not issubclass(request.model_class, SparseModule):
                raise UsageError(
                    f"{request.model_class.__name__} is no SparseModule: compare asks a model for its baselines; a "
                    "LightningModule of your own needs the section sparsify (docs/your_model.md)"
                )
            try:
                registry.comparison_of(request.model_class)
            except ValueError as error:
                raise UsageError(str(error)) from error
        with request.naming_origins():
            self._sections = Sections(request.config)
            self._read(request)

    def _read(self, request: Request) -> None:
        """Read what a comparison needs to know of the configuration, and check that it can compare."""
        self._config = self._sections.plain()
        seed = self._config["seed_everything"]
        self.seed = seed if isinstance(seed, int) and not isinstance(seed, bool) else 0
        seed_everything(self.seed, workers=True)
        self._rate_name = self._find_rate()
        self.ladder: dict[str, Any] | None = self._config["ladder"]
        self.threads: int | None = self._config["threads"]
        self.compiles = bool(self._config["compile"])
        made = self._make()
        model, data = made["model"], made["data"]
        options = {k: v for k, v in made["trainer"].items() if k not in _OWN}
        self.trainer_options = {**options, **device_options(options), "devices": 1}
        set_matmul_precision(self.trainer_options, self._config["float32_matmul_precision"])
        if made["trainer"].get("fast_dev_run"):
            raise UsageError("trainer.fast_dev_run: a comparison needs whole runs")
        if getattr(model, "grow", None) is not None:
            raise UsageError("model.grow: a comparison trains all models from scratch; set it to null")
        if getattr(model, "distil", None) is not None:
            raise UsageError("model.distil: a comparison trains all models on the labels alone; set it to null")
        check_links(request, self._sections, data)
        self.monitor, self.monitor_mode = model.monitor, model.monitor_mode
        self.test_monitor = model.test_monitor
        self.rate: float | None = self._configured_rate(model)
        monitored = self.monitor.partition("/")[2]
        self.shown_metrics = tuple(name for name in model.shown_metrics if name != monitored)
        self.task_metrics: tuple[str, ...] = tuple(model.comparison.task_metrics)
        self.average_last: int | None = model.average_last
        self.replaced = tuple(model.comparison.moe_block_names)
        self.modules = (type(model.module).__module__, type(data).__module__)

    def _windows(self) -> tuple[str, int]:
        """Return the option that names the test window of a split by time, and the number of windows in turn, or 1."""
        for option in ("data.table.split", "data.split"):
            split = at(self._config, option.split("."))
            if isinstance(split, Mapping) and split.get("origins", 1) > 1 and split.get("origin") is None:
                return f"{option}.origin", split["origins"]
        return "", 1

    @property
    def num_windows(self) -> int:
        """Test windows that the seeds take in turn, each trained on what is before it; 1: all have the same rows."""
        return self._windows()[1]

    def _make(self, rate: float | None = None, seed: int | None = None) -> Any:
        """Return model, data and trainer options; a user's own model is made with the learning rate and made sparse."""
        changed: dict[str, Any] = {}
        if self._rate_name is not None and rate is not None:
            changed[self._rate_name] = rate
        option, count = self._windows()
        if count > 1 and seed is not None:
            changed[option] = (seed - self.seed) % count
        made = (self._sections.changed(changed) if changed else self._sections).make()
        section = made["sparsify"]
        if section is not None:
            made["model"] = own_model(made["model"], section)
        made["model"] = self._judged(made["model"])
        return made

    def _judged(self, model: Any) -> Any:
        """Return ``model``, to be judged by its loss if all are."""
        if self.by_loss and isinstance(model, SparseModule):
            model.monitor, model.monitor_mode = "val/loss", "min"  # type: ignore[misc]
        elif self.by_loss and model.monitor_mode == "max":
            raise UsageError(
                f"a ladder fits a loss, and sparsify.metric={model.monitor} is none: name the validation loss, with "
                "sparsify.mode min"
            )
        return model

    def _find_rate(self) -> str | None:
        """Return the option that is the learning rate: of the section optimizer, else of a user's own model; None: it
        has none, or belongs to the suite.

        Raises:
            ValueError: the section names one that the model does not have.
        """
        if isinstance(at(self._config, ("optimizer", "lr")), (int, float)):
            return "optimizer.lr"
        section = self._config["sparsify"]
        if section is None:
            return None
        named = section["learning_rate"]
        for name in ("lr", "learning_rate") if named is None else (named,):
            value = at(self._config, ("model", name))
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return f"model.{name}"
        if named is not None:
            raise ValueError(f"sparsify.learning_rate={named!r} is no argument of the model that has a number")
        return None

    def _configured_rate(self, model: Any) -> float | None:
        if isinstance(model, OwnModel) or self._rate_name is not None:
            return None if self._rate_name is None else float(at(self._config, self._rate_name.split(".")))
        return float(model.lr)

    def num_steps(self, train_batches: float) -> int:
        """Return the optimizer steps of the configured training, of so many batches an epoch; a million without end.

        Raises:
            ValueError: the training has epochs and no steps, and an epoch is a stream of infinitely many batches.
        """
        options, most = self.trainer_options, 1_000_000
        max_steps, max_epochs = options.get("max_steps"), options.get("max_epochs")
        limit = options.get("limit_train_batches")
        if isinstance(limit, int):
            train_batches = min(train_batches, limit)
        elif isinstance(limit, float):
            train_batches *= limit
        steps = math.inf if max_steps in (None, -1) else float(max_steps)
        if math.isinf(train_batches) and math.isinf(steps) and max_epochs not in (None, -1):
            raise ValueError(
                f"trainer.max_epochs={max_epochs}: the training data have no length, so nothing says how many steps an "
                "epoch has: give trainer.max_steps"
            )
        if max_epochs not in (None, -1) and not math.isinf(train_batches):
            accumulated = int(options.get("accumulate_grad_batches") or 1)
            steps = min(steps, max_epochs * max(1.0, math.ceil(train_batches / accumulated)))
        return int(min(max(steps, 1.0), most))

    def plain(self) -> dict[str, Any]:
        """Return model, data, trainer and seed as plain values, without options that a comparison sets itself."""
        values = self._config
        trainer = {k: v for k, v in values["trainer"].items() if k not in _OWN or k == "callbacks"}
        trainer |= device_options(trainer)  # a comparison resumes where it began
        own = {name: values[name] for name in ("sparsify", "threads", *SECTIONS) if values.get(name) is not None}
        if (precision := values["float32_matmul_precision"]) != "high":
            own["float32_matmul_precision"] = precision
        plain = {"model": values["model"], "data": values["data"], **own, "trainer": trainer, "seed": self.seed}
        return with_short_names(plain)

    def data(self) -> LightningDataModule:
        return self._make(seed=self.seed)["data"]

    def callbacks(self) -> list[Callback]:
        """Return new callbacks of the configuration, without bars, checkpoints and those that end a training early."""
        if not self._config["trainer"]["callbacks"]:
            return []
        given = self._make()["trainer"]["callbacks"]
        given = given if isinstance(given, list) else [given]
        return [c for c in given if not isinstance(c, (Checkpoint, EarlyStopping, ProgressBar, Timer))]

    def trainer(self, *callbacks: Callback, **options: Any) -> Trainer:
        """Return a trainer with the configuration's options and ``options`` over them, and its callbacks and these.

        It draws no bars, and without such options it logs nothing and keeps no checkpoint.
        """
        own = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
        options = {**self.trainer_options, **own, "logger": False, "enable_checkpointing": False, **options}
        return Trainer(**options, callbacks=[*self.callbacks(), *callbacks])

    def still(self, data: LightningDataModule) -> Still:
        """Return a trainer with the configuration's options that does not run, for data that are set up."""
        trainer = Still(**self.trainer_options, logger=False, enable_checkpointing=False, enable_progress_bar=False)
        trainer.datamodule = data  # type: ignore[attr-defined]
        return trainer

    def module(self, system: str) -> Any:
        """Return a new, untrained model of ``system``: a ``SparseModule``, an ``OwnModel``, or an ``Estimator``."""
        return self.build(system, seed=self.seed)[0]

    def build(self, system: str, rate: float | None = None, seed: int | None = None) -> tuple[Any, LightningDataModule]:
        """Return a new, untrained model of ``system``, whose weights depend only on the generators, and new data.

        Its learning rate is ``rate``; None: the configuration's. Of several test windows the data have that of the
        ``seed``, the first seed the first one; None: the last one, as a fit has it.
        """
        state = torch.get_rng_state()
        made = self._make(rate, seed)
        model, data = made.pop("model"), made["data"]
        if system != SPARSE:
            build = candidates(model, self.routers)[system].build
            assert build is not None, system
            torch.set_rng_state(state)
            model = self._judged(build())
            del build
            gc.collect()
        if isinstance(model, SparseModule | OwnModel):
            train_as_given(model.module, made)
        if rate is not None and isinstance(model, SparseModule):
            model.lr = rate
        return model, data


def validation_batch(data: Any, need: str) -> Any:
    """Prepare data for training and return their first validation batch, as a model gets it.

    Args:
        data: the data module.
        need: end of the sentence that says what validation is for, such as "the learning rates are chosen by".

    Raises:
        ValueError: the validation split is missing.
    """
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.val_dataloader()), None)  # a stream has no length
    check_validation(batch is not None, need)
    # A hook may ask whether its trainer trains.
    data.trainer = data.trainer or Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    return data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)


def length_of(loader: Any) -> float:
    """Return the number of batches of a loader; infinite for a stream without a length."""
    try:
        return float(len(loader))
    except (TypeError, NotImplementedError):
        return math.inf


def check_validation(num_batches: float, need: str) -> None:
    """Reject data without a validation batch; ``need`` is as for ``validation_batch``.

    Raises:
        ValueError: there is none.
    """
    if not num_batches:
        raise ValueError(f"the data has no validation split, which {need} (data.val_size)")


def arguments(
    config: str | Path, overlays: Sequence[str], rest: Sequence[str], routers: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return the arguments of an ``Experiment``: a configuration, overlays, single values over both, and routers."""
    files = [str(config), *overlays]
    return (*(part for file in files for part in ("--config", file)), *rest, *(_ROUTERS + r for r in routers))
