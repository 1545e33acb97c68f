"""``TorchRecStrategy``: embedding tables and experts over several processes, the dense network on each of them.

TorchRec's ``DistributedModelParallel`` replaces each ``EmbeddingBagCollection`` by a sharded one. A row's gradient goes
to the process that holds the row, and an optimizer fused into the backward updates the row there; the gradients of
everything else are averaged by DDP, the gradients of sharded experts by FSDP2, and applied by the module's own
optimizer. All are means over the processes, so that N processes with batches of B train as one with batches of N * B.

Lightning's "ddp" cannot: it would copy rank 0's tables over the other ranks' tables, and average rows that are not the
same. It fails at its first collective.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.distributed_c10d import default_pg_timeout
from torch.distributed.tensor import DTensor
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
from torchrec.distributed.types import ShardingPlan

import core
from apps.base.checks import check_at_least, check_name
from apps.base.files import delete
from apps.recsys.tables.columns.embedding import EmbeddingConfig, check_rows_are_stepped
from apps.recsys.tables.columns.tables import set_lr
from apps.recsys.tables.shard import sharding
from apps.recsys.tables.shard.sharding import ComputeKernel, Sharding, ShardingConfig
from apps.train.checkpoint import sharded
from apps.train.lightning_internals import prepare_for_fsdp, set_module
from apps.train.optim.averaging import WeightEMA
from apps.train.sharded.processes import join_again
from apps.train.sharded.strategy import (
    DividedStrategy,
    check_grows_whole,
    check_ranks_alike,
    divide_experts,
    step_one_by_one,
)
from apps.train.sharded.torchrec_rows import OPTIMIZERS, copy_rows, is_split
from apps.train.torch_internals import limit_waiting
from core.parallel import average_experts, broadcast_parameters, expert_mesh, experts_part


class TorchRecStrategy(DividedStrategy, DDPStrategy):
    """Shards the embedding tables of a model over the processes of a run, and divides its experts among them.

    Checkpoints are folders of shards (``apps.train.checkpoint.sharded``): each process writes its rows.
    ``moesaic test`` reads them on any number of processes, with this strategy and without. Training resumes from them
    with this strategy, on another number of processes too, except for column-wise tables under rowwise_adagrad.

    Args:
        sharding: how each table is spread: "table_wise", a table on one process; "row_wise", its rows over all;
            "column_wise", its columns over all; "table_row_wise", its rows over the processes of one node;
            "data_parallel", a whole table on each process, updated by the module's optimizer; "auto": TorchRec's
            planner chooses among table_wise, row_wise and table_row_wise, which all train alike.
        table_sharding: sharding of single columns' tables, by the column's name, instead of ``sharding``.
        compute_kernel: place of the tables: "fused": the device's memory; "fused_uvm": the host's, read over the bus;
            "fused_uvm_caching": the host's, with a cache on the device. The last two need GPUs.
        memory_gib: memory of each process for its tables and their optimizer state; None: 80% of the device's, or of
            the host's shared among its processes.
        embedding_optimizer: "rowwise_adagrad", "adagrad" or "sgd", and "adam" on GPUs; None: the model's
            ``embedding.fused_optimizer``, so that kind="fused" on one process trains alike.
        embedding_lr: its peak learning rate; the schedule of the module's optimizer applies to it. None: the model's
            ``embedding.fused_lr``.
        expert_parallel_size: neighboring processes that share out the experts of each layer with routers, as in
            ``apps.train.sharded.expert_parallel.ExpertParallelStrategy``; "auto": all on a machine. Tables lie on all
            processes, whatever the number.
        process_group_backend: "gloo" or "nccl"; None: gloo on CPUs, nccl on GPUs.
        timeout: longest time of a collective.

    Raises:
        ValueError: a value is not known. At the start of a run: the model has no collection to shard, tables do not fit
            or cannot be sharded as asked, experts cannot be sharded so, gradients are clipped or accumulated (rows are
            updated inside the backward), there is a moving average of the weights, a module's optimizer would update
            the sharded rows as well, or processes have other models, configurations or versions of the code.
        LostProcessError: another process was lost in mid-run.

    Example::

        torchrun --nproc-per-node 2 -m apps.cli fit --config configs/recsys/census_income.yaml \\
            --config configs/parallel/torchrec.yaml --trainer.devices 2
    """

    shards_tables = True

    def __init__(
        self,
        sharding: Sharding = "auto",
        table_sharding: Mapping[str, Sharding] | None = None,
        compute_kernel: ComputeKernel = "fused",
        memory_gib: float | None = None,
        embedding_optimizer: str | None = None,
        embedding_lr: float | None = None,
        expert_parallel_size: int | Literal["auto"] = 1,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)
        self.timeout = timeout
        self.config = ShardingConfig(sharding, table_sharding or {}, compute_kernel, memory_gib)
        check_at_least(1, expert_parallel_size=None if expert_parallel_size == "auto" else expert_parallel_size)
        self.expert_parallel_size = expert_parallel_size
        if embedding_lr is not None and not embedding_lr > 0:
            raise ValueError(f"embedding_lr={embedding_lr} must be positive")
        self.embedding_optimizer, self.embedding_lr = embedding_optimizer, embedding_lr
        if embedding_optimizer is not None:
            check_name("embedding_optimizer", embedding_optimizer, list(OPTIMIZERS))
        self.plan: ShardingPlan | None = None
        self.num_params_elsewhere = 0
        self._peak_lr = 0.0

    # ---- set-up

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """True: a shard is read into the sharded table."""
        return True

    def setup_distributed(self) -> None:
        join_again(self.process_group_backend or dist.get_default_backend_for_device(self.root_device), self.timeout)
        super().setup_distributed()

    def setup(self, trainer: Trainer) -> None:
        module, fitting = self.lightning_module, trainer.state.fn == TrainerFn.FITTING
        assert module is not None
        assert self.accelerator is not None
        self._check(trainer, module, fitting)
        self.accelerator.setup(trainer)
        prepare_for_fsdp(trainer)
        self.precision_plugin.convert_module(module)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch, about what TorchRec calls
            self.model = self._shard(module, getattr(trainer.datamodule, "batch_size", 512), fitting)
        if fitting:
            self.setup_optimizers(trainer)
            self._check_optimizers(module)
            step_one_by_one(self.optimizers)
        self.setup_precision_plugin()

    def _check(self, trainer: Trainer, module: LightningModule, fitting: bool) -> None:
        if not sharding.collections(module) and not sharding.sharded_collections(module):
            kind = getattr(getattr(module, "embedding", None), "kind", None)
            what = f"embedding.kind={kind!r} is one tensor" if kind else f"{type(module).__name__} has no collection"
            raise ValueError(
                f"TorchRecStrategy finds no tables to shard: {what}; set model.embedding.kind='collection', with at "
                "least one embedded column"
            )
        device = self.root_device.type
        if self.config.compute_kernel != "fused" and device == "cpu":
            raise ValueError(f"compute_kernel={self.config.compute_kernel!r} needs a GPU; on a CPU there is 'fused'")
        optimizer = self._fused_options(module)[0]
        if optimizer == "adam" and device == "cpu":
            raise ValueError("embedding_optimizer='adam' needs a GPU; take 'rowwise_adagrad', 'adagrad' or 'sgd'")
        if not fitting:
            return
        check_grows_whole(module)
        check_rows_are_stepped(trainer, "TorchRecStrategy")
        if any(isinstance(c, WeightEMA) for c in trainer.callbacks):
            raise ValueError("TorchRecStrategy keeps no moving average of sharded tables: set model.ema_decay=null")

    def _fused_options(self, module: LightningModule) -> tuple[str, float]:
        own: Any = getattr(module, "embedding", EmbeddingConfig())
        return self.embedding_optimizer or own.fused_optimizer, self.embedding_lr or own.fused_lr

    def _shard(self, module: LightningModule, batch_size: int, fitting: bool) -> nn.Module:
        optimizer, self._peak_lr = self._fused_options(module)
        shard = sharding.sharder(optimizer, self._peak_lr)
        whole = {path: c.state_dict() for path, c in sharding.collections(module).items()}
        plan = ShardingPlan({})  # the module of an earlier fit is sharded already
        if whole:
            processes = sharding.Processes(self.world_size, self.num_processes, self.root_device)
            plan = self.plan = sharding.plan(module, self.config, shard, processes, batch_size)
            self._divide(module)
        divided = [name for name, p in module.named_parameters() if isinstance(p, DTensor)]
        model = DistributedModelParallel(
            module,
            device=self.root_device,
            plan=plan,
            sharders=[shard],
            init_data_parallel=False,
            data_parallel_wrapper=DefaultDataParallelWrapper(static_graph=False, params_to_ignore=divided),
        )
        # TorchRec has reinitialized the rows: put back the model's, as one process would have them.
        rows = sharding.tables(module)
        for path, state in whole.items():
            for name, full in state.items():
                target = rows[f"{path}.{name}"]
                if full.is_meta:
                    sharding.draw_rows(target, name, module.get_submodule(path.rpartition(".")[0]))
                else:
                    copy_rows(target, full)
        split = [value for value in rows.values() if is_split(value)]
        here = sum(part.tensor.numel() for value in split for part in value.local_shards())
        self.num_params_elsewhere = sum(value.size().numel() for value in split) - here
        if fitting:
            model.init_data_parallel()
        elif self.root_device.type != "cpu":
            module.to(self.root_device)
        return model

    def _divide(self, module: LightningModule) -> None:
        """Shard the experts, and print the placement."""
        check_ranks_alike(module)
        experts = self.num_processes if self.expert_parallel_size == "auto" else self.expert_parallel_size
        mesh = expert_mesh(experts, device_type=self.root_device.type)
        part = experts_part(mesh)
        if part is not None:
            for layer in core.moe_layers(module).values():
                broadcast_parameters(layer.to(self.root_device))
            divide_experts(module, part)
            average_experts(module, mesh)
        limit_waiting(self.timeout)
        if self.is_global_zero:
            assert self.plan is not None
            for line in sharding.described(self.plan, self.world_size):
                print(line)

    def _check_optimizers(self, module: LightningModule) -> None:
        stepped = {id(p) for o in self.optimizers for g in o.param_groups for p in g["params"]}
        for name, parameter in module.named_parameters():
            if hasattr(parameter, "_in_backward_optimizers") and id(parameter) in stepped:
                raise ValueError(
                    f"configure_optimizers of {type(module).__name__} takes {name}, whose rows are stepped in the "
                    "backward: leave out parameters with _in_backward_optimizers"
                )

    # ---- steps

    @property
    def fused_optimizer(self) -> Any:
        """TorchRec's ``CombinedOptimizer`` of the sharded tables."""
        assert isinstance(self.model, DistributedModelParallel)
        return self.model.fused_optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._set_embedding_lr()
        return super().training_step(*args, **kwargs)

    def _set_embedding_lr(self) -> None:
        """Set the rate of this step by the schedule of the module's optimizer."""
        groups = [g for o in self.optimizers for g in o.param_groups]
        factor = groups[0]["lr"] / groups[0]["initial_lr"] if groups and "initial_lr" in groups[0] else 1.0
        set_lr(self.fused_optimizer, self._peak_lr * factor)

    def teardown(self) -> None:
        # Lightning moves the module to the CPU, which a sharded table on a GPU cannot be.
        module = self.lightning_module
        if self.root_device.type != "cpu":
            set_module(self, None)
        try:
            super().teardown()
        finally:
            set_module(self, module)

    # ---- checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the state dict without the sharded tables, which ``save_checkpoint`` writes next to it."""
        assert self.lightning_module is not None
        state = self.lightning_module.state_dict()
        return {k: _plain(v) for k, v in state.items() if not is_split(v)}

    def _split(self, with_state: bool) -> dict[str, Any]:
        """Return the sharded tensors by their names in ``apps.train.checkpoint.sharded``."""
        assert self.lightning_module is not None
        tables = sharding.tables(self.lightning_module)
        tensors = {f"{sharded.WEIGHT}{name}": value for name, value in tables.items() if is_split(value)}
        if with_state:
            for parameter, values in self.fused_optimizer.state_dict()["state"].items():
                tensors |= {f"{sharded.STATE}{parameter}/{name}": value for name, value in values.items()}
        return tensors

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write the folder of a sharded checkpoint; all processes take part."""
        if storage_options is not None:
            raise ValueError("TorchRecStrategy writes folders of shards and takes no storage_options")
        sharded.write(Path(self.broadcast(str(filepath))), checkpoint, self._split(with_state=True))

    def remove_checkpoint(self, filepath: Any) -> None:
        if self.is_global_zero:
            delete(Path(filepath))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Return what Lightning restores. The tables are read here, each process its own rows."""
        path = Path(checkpoint_path)
        fitting = self.lightning_module is not None and self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        is_sharded = sharded.is_sharded(path)
        if fitting and not is_sharded:
            raise ValueError(
                f"{path} is not sharded: its optimizer's state is of other parameters. Training continues from it "
                "without TorchRecStrategy; validate, test and predict take it"
            )
        checkpoint = self.read_divided(path)
        if is_sharded:
            sharded.load(path, checkpoint, self._split(with_state=fitting))
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module = self.lightning_module
        assert module is not None
        state, own = dict(checkpoint["state_dict"]), module.state_dict()
        for name, target in sharding.tables(module).items():
            full = state.pop(name, None)
            if full is not None:
                copy_rows(target, full)
        rest = {name: value for name, value in own.items() if name not in sharding.tables(module)}
        wrong = sorted(rest.keys() ^ state.keys())
        if strict and wrong:
            there = "not in the model" if wrong[0] in state else "missing in the checkpoint"
            raise ValueError(f"the checkpoint does not fit this model: {wrong[0]} is {there}")
        module.load_state_dict(state, strict=False)


def _plain(value: Any) -> Any:
    """Copy a value without TorchRec's parameter classes, which a checkpoint that is read without code cannot hold."""
    if isinstance(value, torch.Tensor) and type(value) not in (torch.Tensor, DTensor):
        return value.detach().as_subclass(torch.Tensor).clone()
    return value
