"""The plan of which process holds which rows of the embedding tables, and access to tables that are sharded."""

from __future__ import annotations

import math
import os
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    KernelConfig,
    PlannerError,
    PlannerErrorType,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ParameterSharding, ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from apps.train.sharded.torchrec_rows import OPTIMIZERS, is_split
from core.fields import Checked, Positive

Sharding = Literal["auto", "table_wise", "row_wise", "column_wise", "table_row_wise", "data_parallel"]
ComputeKernel = Literal["fused", "fused_uvm", "fused_uvm_caching"]

# What the planner may choose by itself does not change the result, but for the order of sums.
_AUTO = ("table_wise", "row_wise", "table_row_wise")
_GIB = 2**30


@dataclass(frozen=True)
class ShardingConfig(Checked):
    """Options of ``TorchRecStrategy`` that say how tables are spread over processes.

    Raises:
        ValueError: a value is not known, or not positive.
    """

    sharding: Sharding = "auto"
    table_sharding: Mapping[str, Sharding] = field(default_factory=dict)
    compute_kernel: ComputeKernel = "fused"
    memory_gib: Positive | None = None


class Sharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder with row-wise tables on a CPU, which it leaves out though they run there."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [s for s in get_args(Sharding) if s != "auto"]


def sharder(optimizer: str, lr: float) -> Sharder:
    """Return what shards a collection whose rows ``optimizer``, a key of ``OPTIMIZERS``, steps inside the backward."""
    return Sharder(fused_params={"optimizer": OPTIMIZERS[optimizer], "learning_rate": lr})


def collections(module: nn.Module) -> dict[str, EmbeddingBagCollection]:
    """Return the collections that can be sharded, by their path."""
    return {name: m for name, m in module.named_modules() if type(m) is EmbeddingBagCollection}


def sharded_collections(module: nn.Module) -> dict[str, ShardedEmbeddingBagCollection]:
    """Return the sharded collections, by their path."""
    return {name: m for name, m in module.named_modules() if isinstance(m, ShardedEmbeddingBagCollection)}


@dataclass(frozen=True)
class Processes:
    """The processes of a run: how many there are in all and on each machine, and the device of this one."""

    world_size: int
    local_world_size: int
    device: torch.device


def plan(
    module: nn.Module, config: ShardingConfig, shard: Sharder, processes: Processes, batch_size: int
) -> ShardingPlan:
    """Return rank 0's plan on all ranks, or raise its error on all of them.

    Raises:
        ValueError: ``table_sharding`` names no column, or the tables do not fit into the processes' memory or cannot
            be sharded as asked.
    """
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [local_plan(module, config, shard, processes, batch_size)]
        except ValueError as error:  # a rank that waits for the plan would wait for ever
            answer = [str(error)]
    dist.broadcast_object_list(answer)
    if isinstance(answer[0], str):
        raise ValueError(answer[0])
    return answer[0]


def local_plan(
    module: nn.Module, config: ShardingConfig, shard: Sharder, processes: Processes, batch_size: int
) -> ShardingPlan:
    """Return the plan for ``processes``, which need not run; tables may be on the meta device.

    Raises:
        ValueError: as for ``plan``.
    """
    on_gpu = processes.device.type == "cuda"
    tables = {t.name: t for c in collections(module).values() for t in c.embedding_bag_configs()}
    columns = {column: t.name for t in tables.values() for column in t.feature_names}
    for column in config.table_sharding:
        if column not in columns:
            raise ValueError(f"table_sharding names {column!r}, which is no embedded column: {', '.join(columns)}")
    for t in tables.values():
        if t.embedding_dim % 4:
            raise ValueError(f"{t.name} is {t.embedding_dim} wide; the kernels of sharded tables take multiples of 4")
    wanted = dict.fromkeys(tables, config.sharding) | {columns[c]: s for c, s in config.table_sharding.items()}
    for name, sharding in wanted.items():
        rows = tables[name].num_embeddings
        if not on_gpu and not _fills(sharding, rows, processes):
            raise ValueError(
                f"{name} has {rows} rows, of which {sharding} leaves a process none, and the kernel on CPUs takes no "
                "empty table: set its table_sharding to table_wise"
            )
    constraints = {
        name: ParameterConstraints(
            sharding_types=[s for s in _AUTO if _fills(s, tables[name].num_embeddings, processes)]
            if sharding == "auto"
            else [sharding],
            compute_kernels=["dense"] if sharding == "data_parallel" else [config.compute_kernel],
            min_partition=_columns(tables[name].embedding_dim, processes) if sharding == "column_wise" else None,
        )
        for name, sharding in wanted.items()
    }
    host = int(0.8 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / processes.local_world_size)
    memory = host
    if config.memory_gib is not None:
        memory = int(config.memory_gib * _GIB)
    elif on_gpu:
        memory = int(0.8 * torch.cuda.get_device_properties(processes.device).total_memory)
    topology = TopologyFactory.create_topology(
        TrainerConfig(
            world_size=processes.world_size,
            local_world_size=processes.local_world_size,
            hbm_cap_bytes=memory if on_gpu else None,
            ddr_cap_bytes=host if on_gpu else memory,
        ),
        kernel_config=KernelConfig(compute_device=processes.device.type),
    )
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(0.0),
        debug=False,
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return planner.plan(module, [shard])
    except PlannerError as error:
        raise ValueError(_failure(error, tables.values(), wanted, memory, processes.world_size)) from error


def described(plan: ShardingPlan, world_size: int) -> list[str]:
    """Return lines that say which tables are where, such as "table_shop: row_wise on 2 processes"."""
    where: dict[str, list[str]] = {}
    for collection in plan.plan.values():
        for name, table in cast(Mapping[str, ParameterSharding], collection).items():
            ranks = table.ranks or list(range(world_size))
            place = f"process {ranks[0]}" if len(ranks) == 1 else f"{len(ranks)} processes"
            where.setdefault(f"{table.sharding_type} on {place}", []).append(name)
    return [f"{', '.join(names) if len(names) < 5 else f'{len(names)} tables'}: {at}" for at, names in where.items()]


def _fills(sharding: str, rows: int, processes: Processes) -> bool:
    """Return whether a sharding by rows gives some to each process: of 5 rows, 4 processes have 2, 2, 1 and 0."""
    parts = {"row_wise": processes.world_size, "table_row_wise": processes.local_world_size}.get(sharding, 1)
    return rows > math.ceil(rows / parts) * (parts - 1)


def _columns(dim: int, processes: Processes) -> int:
    """Return the columns of a shard, a multiple of 4 that divides ``dim``: a shard a process, or as many as can be."""
    return next(n for n in range(4, dim + 1, 4) if dim % n == 0 and n * processes.world_size >= dim)


def _failure(error: PlannerError, tables: Any, wanted: Mapping[str, str], memory: int, world_size: int) -> str:
    kinds = ", ".join(sorted(set(wanted.values())))
    too_large = (PlannerErrorType.INSUFFICIENT_STORAGE, PlannerErrorType.PARTITION, PlannerErrorType.STRICT_CONSTRAINTS)
    if error.error_type in too_large:
        size = {t.name: 4 * t.num_embeddings * t.embedding_dim for t in tables}
        largest = max(size, key=lambda name: size[name])
        return (
            f"the tables do not fit: {sum(size.values()) / _GIB:.3g} GiB of weights (the largest, {largest}, "
            f"{size[largest] / _GIB:.3g}), besides optimizer state and buffers, for {world_size} processes "
            f"of {memory / _GIB:.3g} GiB each with sharding {kinds}: take more processes, a higher memory_gib, or "
            "row_wise for the largest"
        )
    return f"no plan with sharding {kinds}: {' '.join(str(error).split())[:200]}"


def tables(module: nn.Module) -> dict[str, Any]:
    """Return the weights of sharded collections by their names in the state dict; they share memory with the module.

    They are ``ShardedTensor``, or plain where each process has all of them (data_parallel).
    """
    collections_by_path = sharded_collections(module).items()
    return {f"{path}.{name}": value for path, c in collections_by_path for name, value in c.state_dict().items()}


def draw_rows(target: Any, name: str, owner: nn.Module) -> None:
    """Start the rows that this process holds of a table that no process holds whole.

    Args:
        target: one of ``tables``.
        name: name of the table; with the run's seed and the shard's place it decides the rows.
        owner: the module around the collection, whose ``draw_rows(rows, first, generator)`` draws them.

    Raises:
        ValueError: the owner has none.
    """
    draw = getattr(owner, "draw_rows", None)
    if draw is None:
        raise ValueError(f"{type(owner).__name__} holds tables on the meta device and has no draw_rows to start them")
    parts = [((0, 0), target)]
    if is_split(target):
        parts = [(tuple(p.metadata.shard_offsets), p.tensor) for p in target.local_shards()]
    for (row, column), rows in parts:
        # The seed is the run's, on which all ranks agree.
        entropy = [torch.initial_seed(), zlib.crc32(name.encode()), row, column]
        seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)
        draw(rows, row, torch.Generator(rows.device).manual_seed(seed))
