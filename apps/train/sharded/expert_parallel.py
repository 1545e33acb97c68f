"""``ExpertParallelStrategy``: a training whose experts are sharded among processes, on DTensor and FSDP2."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import nn
from torch.distributed.distributed_c10d import default_pg_timeout
from torch.distributed.fsdp import MixedPrecisionPolicy

from apps.base.checks import check_at_least, check_name
from apps.base.files import delete
from apps.train.checkpoint import sharded
from apps.train.lightning_internals import begin_processes, prepare_for_fsdp, step_by_call
from apps.train.sharded.processes import join_again
from apps.train.sharded.strategy import (
    DividedStrategy,
    check_grows_whole,
    check_ranks_alike,
    divide_experts,
    step_one_by_one,
)
from apps.train.torch_internals import checkpoint_activations, limit_waiting
from core.parallel import (
    blocks_of,
    broadcast_parameters,
    clip_grad_norm,
    expert_mesh,
    experts_part,
    local_part,
    shard_data,
    sharded_modules,
)

_logger = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class ExpertParallelStrategy(DividedStrategy, ModelParallelStrategy):
    """Trains on several processes, with the experts of each MoE layer sharded among some of them.

    The processes form a mesh of replicas x shards x experts, and each has examples of its own. Tokens travel to the
    experts' processes in every layer (``core.parallel.AllToAllDispatcher``). All other parameters are copied (as in
    DDP) or sharded (FSDP2), and every gradient is the mean over all processes. Losses, figures and selection biases are
    those of the global batch. With ``expert_parallel_size: 1`` it is DDP or FSDP2 alone, also for models without
    experts.

    Checkpoints are folders of shards (``apps.train.checkpoint.sharded``). A run resumes from them on another number of
    processes, with another sharding, or on one process without this strategy; ``moesaic convert consolidate`` makes one
    file.

    Args:
        expert_parallel_size: processes that share out the experts of a layer; "auto": all on a machine that
            ``expert_tensor_parallel_size`` leaves.
        fsdp_size: groups of such processes among which parameters are sharded further.
        nodes: machines that share out the experts too, with an all-to-all within each machine first.
        expert_tensor_parallel_size: processes that share out the hidden units of each expert, where there are more
            processes than experts.
        static_all_to_all: whether every expert is sent as many rows as its capacity allows, so that no host waits for a
            GPU; it needs a ``capacity_factor`` and batches of one size.
        non_experts: what becomes of all other parameters: "replicate", a copy on each process; "shard", sharded over
            ``fsdp_size`` and the experts' processes.
        param_dtype: dtype in which sharded parameters are gathered and computed, "bfloat16" or "float16"; None: their
            own. ``trainer.precision`` does not need it.
        reshard_after_forward: whether a block's parameters are freed after its forward and gathered again for the
            backward; None: they are.
        activation_checkpointing: whether blocks compute their activations again in the backward.
        async_checkpoints: whether training continues while a checkpoint is written, from a copy in the memory of the
            host. A checkpoint waits for the one before, and a failure is raised then, or when the training ends.
        process_group_backend: of torch.distributed; None: by the device.
        timeout: time after which a process that hears nothing of another gives up.

    Raises:
        ValueError: a size below 1, or another word than these; when a run starts, a mesh that does not fit the
            processes, experts that the processes do not split evenly or that cannot be sharded, single experts that are
            frozen, or processes with other models, configurations or versions of the code.
        LostProcessError: another process was lost in mid-run.

    Example::

        moesaic fit --config configs/vision/digits.yaml --config configs/parallel/expert_parallel.yaml \\
            --trainer.devices 2
    """

    def __init__(
        self,
        expert_parallel_size: int | Literal["auto"] = "auto",
        fsdp_size: int = 1,
        nodes: int = 1,
        expert_tensor_parallel_size: int = 1,
        static_all_to_all: bool = False,
        non_experts: Literal["replicate", "shard"] = "replicate",
        param_dtype: Literal["bfloat16", "float16"] | None = None,
        reshard_after_forward: bool | None = None,
        activation_checkpointing: bool = False,
        async_checkpoints: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)
        self.timeout = timeout
        check_at_least(1, fsdp_size=fsdp_size, nodes=nodes, expert_tensor_parallel_size=expert_tensor_parallel_size)
        check_at_least(1, expert_parallel_size=None if expert_parallel_size == "auto" else expert_parallel_size)
        check_name("non_experts", non_experts, ["replicate", "shard"])
        if param_dtype is not None:
            check_name("param_dtype", param_dtype, list(DTYPES))
        self.expert_parallel_size, self.fsdp_size, self.nodes = expert_parallel_size, fsdp_size, nodes
        self.expert_tensor_parallel_size, self.non_experts = expert_tensor_parallel_size, non_experts
        self.static_all_to_all = static_all_to_all
        self.param_dtype, self.reshard_after_forward = param_dtype, reshard_after_forward
        self.activation_checkpointing = activation_checkpointing
        self.async_checkpoints = async_checkpoints
        self._writer = sharded.BackgroundWriter(timeout)

    # ---- set-up

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def setup_environment(self) -> None:
        join_again(self.process_group_backend or dist.get_default_backend_for_device(self.root_device), self.timeout)
        hidden, size = self.expert_tensor_parallel_size, self.expert_parallel_size
        experts = max(self.num_processes // hidden, 1) if size == "auto" else size
        options: dict[str, Any] = {"nodes": self.nodes, "hidden": hidden, "device_type": self.root_device.type}
        begin_processes(self, lambda: expert_mesh(experts, self.fsdp_size, **options))
        limit_waiting(self.timeout)

    def setup(self, trainer: Trainer) -> None:
        module, fitting = self.lightning_module, trainer.state.fn == TrainerFn.FITTING
        assert module is not None
        assert self.accelerator is not None
        if fitting:
            check_grows_whole(module)
        self.accelerator.setup(trainer)
        prepare_for_fsdp(trainer)
        # torch's own clipping adds up no norms of tensors that are sharded in different ways.
        self.precision_plugin.clip_grad_by_norm = self._clip_by_norm  # type: ignore[method-assign]
        self.precision_plugin.clip_grad_by_value = self._clip_by_value  # type: ignore[method-assign]
        self.model = self.precision_plugin.convert_module(module)
        if next(sharded_modules(module), None) is None:  # the module of an earlier fit is sharded already
            self.model_to_device()
            self._shard(module)
        if fitting:
            self.setup_optimizers(trainer)
            step_one_by_one(self.optimizers)
        self.setup_precision_plugin()

    def _shard(self, module: LightningModule) -> None:
        mesh = self.device_mesh
        check_ranks_alike(module)
        broadcast_parameters(module)
        whole = sum(p.numel() for p in module.parameters())
        part = experts_part(mesh)
        if part is not None:
            divide_experts(module, part, static=self.static_all_to_all)
        if self.activation_checkpointing:
            for block in blocks_of(module):
                checkpoint_activations(block)
        options: dict[str, Any] = {"reshard_after_forward": self.reshard_after_forward}
        if self.param_dtype is not None:
            options["mp_policy"] = MixedPrecisionPolicy(DTYPES[self.param_dtype], torch.float32)
        kind = type(module)
        # Tensors of experts are put together in two steps if they are sharded along two axes, which does not matter.
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        shard_data(module, mesh, shard=self.non_experts == "shard", **options)
        make_root(module)
        limit_waiting(self.timeout)  # of the groups that FSDP2 has made
        # FSDP2 has made a class of this one; checkpoints and messages know the model by its own.
        type(module).__name__, type(module).__qualname__ = kind.__name__, kind.__qualname__
        type(module).__module__ = kind.__module__
        if self.is_global_zero:
            own = sum(local_part(p).numel() for p in module.parameters())
            print(f"{own:,} of {whole:,} parameters on each of {self.world_size} processes")

    # ---- steps

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.train_step_context():
            return step_by_call(self, "training_step", *args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._gathered():
            return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._gathered():
            return super().test_step(*args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._gathered():
            return super().predict_step(*args, **kwargs)

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        """Keep all parameters but the sharded experts whole: an evaluation calls other methods than ``forward``, as a
        search does, which have no hooks."""
        assert self.model is not None
        parts = list(sharded_modules(self.model))
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        try:
            yield
        finally:
            for part in parts:
                part.reshard()
                freed = self.reshard_after_forward is not False and part is not self.model
                part.set_reshard_after_forward(freed, recurse=False)

    def _clip_by_norm(self, optimizer: Any, clip_val: float) -> None:
        clip_grad_norm(self.precision_plugin.main_params(optimizer), clip_val)

    def _clip_by_value(self, optimizer: Any, clip_val: float) -> None:
        for parameter in self.precision_plugin.main_params(optimizer):
            if parameter.grad is not None:
                local_part(parameter.grad).clamp_(-clip_val, clip_val)

    # ---- checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return dict(getattr(optimizer, "optimizer", optimizer).state_dict())

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write the folder of a sharded checkpoint; all processes take part."""
        if storage_options is not None:
            raise ValueError("ExpertParallelStrategy writes folders of shards and takes no storage_options")
        path, trainer = Path(self.broadcast(str(filepath))), self.lightning_module and self.lightning_module.trainer
        if self.async_checkpoints and trainer is not None and trainer.state.status == TrainerStatus.RUNNING:
            self._writer.write(path, checkpoint)
        else:
            self._writer.wait()
            sharded.write(path, checkpoint, {})

    def remove_checkpoint(self, filepath: Any) -> None:
        self._writer.wait()
        if self.is_global_zero:
            delete(Path(filepath))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Return what Lightning restores, with this process's part of each tensor."""
        self._writer.wait()
        return self.read_divided(Path(self.broadcast(str(checkpoint_path))))

    def teardown(self) -> None:
        try:
            self._writer.wait()
        finally:
            super().teardown()

    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        try:
            self._writer.wait()
        except OSError as error:  # the exception is what ends the run
            _logger.error("%s", error)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)


def make_root(module: nn.Module) -> None:
    """Tell FSDP2 that a module is the outermost one, by a call that does nothing: else a block that an evaluation calls
    first, by another way than the module's ``forward``, would take itself for it."""
    module.forward = lambda: None  # type: ignore[method-assign]
    module()
    del module.forward
    for part in sharded_modules(module):
        part.reshard()
