"""Shared code of strategies that shard a model's experts over processes: checks, checkpoints, and a lost process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

import core
from apps.base.messages import one_line
from apps.train.checkpoint import sharded
from apps.train.sharded.processes import LostProcessError, check_started, is_loss
from core.parallel import copy_part, shard_experts

_TRAINER_OPTIONS = (
    *("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"),
    *("check_val_every_n_epoch", "precision"),
)
"""Options of the trainer on which the number of steps or what a step does depends."""

Target = Callable[[list[Any], tuple[int, ...]], DTensor | None]
"""A function from the keys of a place in a checkpoint, and a shape, to the tensor to read into; None: a plain one."""


class DividedStrategy(ParallelStrategy):
    """The base of strategies whose processes hold different parameters; a strategy of Lightning runs them."""

    timeout: timedelta | None
    _loss: BaseException | None = None

    @property
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        check_started(self.local_rank, len(self.parallel_devices))
        return self.parallel_devices[self.local_rank]

    # ---- checkpoints

    def read_divided(self, path: Path) -> dict[str, Any]:
        """Return a checkpoint, a folder or a file, with this process's part of each tensor of a sharded parameter."""
        if sharded.is_sharded(path):
            return sharded.read_placed(path, self._targets())
        checkpoint: dict[str, Any] = self.checkpoint_io.load_checkpoint(path, weights_only=True)
        return cast(dict[str, Any], _divided(checkpoint, [], self._targets()))

    def _targets(self) -> Target:
        """Return a function that makes an empty tensor that is sharded as the parameter is whose value or optimizer's
        state lies at a place of a checkpoint; None if the place does not belong to a sharded parameter of this
        shape."""
        assert self.lightning_module is not None
        state = self.lightning_module.state_dict()
        stepped = [[p for group in o.param_groups for p in group["params"]] for o in self.optimizers]

        def target(keys: list[Any], shape: tuple[int, ...]) -> DTensor | None:
            parameter: Any = None
            if keys[0] in ("state_dict", "trained_state_dict") and len(keys) == 2:
                parameter = state.get(keys[1])
            elif keys[0] == "optimizer_states" and len(keys) == 5 and keys[1] < len(stepped):
                parameters = stepped[keys[1]]
                parameter = parameters[keys[3]] if keys[3] < len(parameters) else None
            if not isinstance(parameter, DTensor) or tuple(parameter.shape) != shape:
                return None
            return cast(DTensor, torch.empty_like(parameter).detach())

        return target

    # ---- a lost process

    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        self._loss = exception if is_loss(exception) else None

    def teardown(self) -> None:
        super().teardown()
        loss, self._loss = self._loss, None
        if loss is not None:
            timeout = "" if self.timeout is None else f" of {self.timeout}"
            raise LostProcessError(
                f"process {self.global_rank} has lost another one, which ended or did not answer within the "
                f"timeout{timeout}; its own output says why ({one_line(str(loss))[:200]})"
            ) from loss


def _divided(value: Any, keys: list[Any], target: Target) -> Any:
    """Return the contents of a file with this process's part of each tensor."""
    if isinstance(value, Tensor):
        own = target(keys, tuple(value.shape)) if keys else None
        return value if own is None else copy_part(cast(DTensor, own.to(value.dtype)), value)
    if isinstance(value, Mapping):
        return {key: _divided(item, [*keys, key], target) for key, item in value.items()}
    if isinstance(value, list):
        return [_divided(item, [*keys, i], target) for i, item in enumerate(value)]
    return value


def divide_experts(module: LightningModule, part: DeviceMesh, *, static: bool = False) -> None:
    """Divide a model's experts among the ranks of a mesh (``core.parallel.shard_experts``); process 0 prints the
    placement.

    Raises:
        ValueError: some experts cannot be sharded; the line names the option that leaves them whole.
    """
    try:
        where = shard_experts(module, part, static=static)
    except ValueError as error:
        raise ValueError(f"{error}; --trainer.strategy.init_args.expert_parallel_size 1 keeps them whole") from error
    if dist.get_rank() == 0:
        for line in dict.fromkeys(where.values()):
            print(f"{', '.join(name for name in where if where[name] == line)}: {line}")


def step_one_by_one(optimizers: Iterable[Optimizer]) -> None:
    """Make optimizers step parameter by parameter if a group has parameters of several meshes, or sharded and plain
    ones: torch's operations on lists do not mix them."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        if len({p.device_mesh if isinstance(p, DTensor) else None for p in group["params"]}) > 1:
            group.update({key: False for key in ("foreach", "fused") if key in group})


def check_grows_whole(module: LightningModule) -> None:
    """Raise an error if a training freezes some experts of a layer: their gradients are not masked on processes.

    Raises:
        ValueError: naming the option.
    """
    if getattr(getattr(module, "grow", None), "freeze", False):
        raise ValueError(
            "model.grow.freeze=True keeps single experts of a layer as they are, which a training on several processes "
            "does not: set model.grow.freeze to false"
        )


def check_ranks_alike(module: LightningModule) -> None:
    """Raise an error if models, options or versions of the code differ from process 0's.

    Raises:
        ValueError: naming the first process that differs, and in what; every process raises it.
    """
    shapes = [(name, tuple(p.shape), str(p.dtype)) for name, p in module.named_parameters()]
    facts = {
        "code": code_digest(),
        "torch": torch.__version__,
        **{f"trainer.{name}": repr(getattr(module.trainer, name)) for name in _TRAINER_OPTIONS},
        **{f"model.{name}": repr(value) for name, value in dict(module.hparams).items()},
        "model": repr(shapes),
    }
    own = {name: hashlib.sha256(value.encode()).hexdigest() for name, value in facts.items()}
    of_ranks: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, own)
    for rank, other in enumerate(of_ranks):
        for name in {**of_ranks[0], **other}:
            if other.get(name) != of_ranks[0].get(name):
                raise ValueError(f"process {rank} has another {name} than process 0: all of them need the same")


def code_digest() -> str:
    """Return a digest of the sources of ``core`` and ``apps``."""
    digest = hashlib.sha256()
    for package in (Path(core.__file__).parent, Path(__file__).parents[2]):
        for file in sorted(package.rglob("*.py")):
            digest.update(str(file.relative_to(package)).encode() + file.read_bytes())
    return digest.hexdigest()
