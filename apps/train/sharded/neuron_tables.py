"""PEER's two tables as tables of TorchRec, with rows sharded over processes and updated inside the backward.

A process looks up each row that its tokens picked once, and computes with these rows as ``core.NeuronExperts`` does
with whole tables. So the network carries a picked row once for each process that picked it, and its gradient back.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder, ShardedEmbeddingCollection
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import core
from apps.base.checks import check_name
from apps.train.sharded.torchrec_rows import OPTIMIZERS, copy_rows
from core.contract import Rows
from core.kernels import expert_of_rows, neurons

TABLES = ("u", "v")


class NeuronTables(core.Experts):
    """E experts ``f_e(x) = act(x . u_e) v_e`` whose tables are those of a TorchRec ``EmbeddingCollection``.

    Parameters: ``tables.embeddings.u.weight`` (E, D) and ``tables.embeddings.v.weight`` (E, D).

    Args:
        experts: the experts with whole tables, whose rows are copied.

    Raises:
        ValueError: u and v have different widths, which one collection does not have.
    """

    def __init__(self, experts: core.NeuronExperts) -> None:
        super().__init__()
        (E, dim), out_dim = experts.u.shape, experts.v.shape[1]
        if out_dim != dim:
            raise ValueError(f"u is {dim} wide and v {out_dim}: the tables of one collection are of one width")
        self.num_experts, self.activation, self.backend = E, experts.activation, experts.backend
        configs = [
            EmbeddingConfig(name=name, num_embeddings=E, embedding_dim=dim, feature_names=[name]) for name in TABLES
        ]
        self.tables: Any = EmbeddingCollection(tables=configs, device=experts.u.device)
        with torch.no_grad():
            for name in TABLES:
                self.tables.embeddings[name].weight.copy_(getattr(experts, name))

    def compute_picked(self, x: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """Return the sum over the experts that each token picked, times their gates, as ``NeuronExperts`` does."""
        row_U, place_TK = torch.unique(ids_TK, return_inverse=True)  # E, where nothing is computed, comes last
        row_U = row_U[row_U < self.num_experts]
        u_UD, v_UD = self._look_up(row_U)
        if not row_U.shape[0]:  # other processes wait for this one's part in the backward
            return x.new_zeros(x.shape[0], v_UD.shape[1]) + (u_UD.sum() + v_UD.sum()) * 0
        return neurons(x, u_UD, v_UD, place_TK, gates_TK, self.activation, backend=self.backend)

    def compute_rows(self, rows: Rows) -> Rows:
        """Return the rows computed, each a token that picks one expert."""
        expert_R = expert_of_rows(rows.x, rows.offsets_E)
        return rows.with_output(self.compute_picked(rows.x, expert_R[:, None], rows.gates_R[:, None]), weighted=True)

    def _look_up(self, row_U: Tensor) -> tuple[Tensor, Tensor]:
        # One list of rows a table, so that all processes agree on the number of lists.
        lengths = torch.full((len(TABLES),), row_U.shape[0], device=row_U.device)
        picked = self.tables(KeyedJaggedTensor(list(TABLES), row_U.repeat(len(TABLES)), lengths=lengths))
        picked = picked.wait() if hasattr(picked, "wait") else picked
        return picked["u"].values(), picked["v"].values()


def use_tables(model: nn.Module) -> list[str]:
    """Give every layer of PEER experts in a model tables of TorchRec, in place; return the layers' names.

    Raises:
        ValueError: as ``NeuronTables``.
    """
    names = []
    for name, layer in core.moe_layers(model).items():
        if isinstance(layer.experts, core.NeuronExperts):
            layer.experts = NeuronTables(layer.experts)
            names.append(name)
    return names


class _Sharder(EmbeddingCollectionSharder):
    """TorchRec's sharder with row-wise tables on a CPU, which it leaves out though they run there."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return ["row_wise"]


def shard_tables(
    model: nn.Module, *, optimizer: str = "rowwise_adagrad", lr: float = 0.02, device: torch.device | None = None
) -> DistributedModelParallel:
    """Spread the rows of a model's PEER tables over the processes of the default group.

    Every process calls it with the same model. A step then has the gradients of the whole batch, as means over the
    processes: rows are stepped inside the backward, everything else by an optimizer of the caller's, who leaves out
    parameters with ``_in_backward_optimizers``. A call of the model is one of all processes, with tokens or without.
    ``apps.train.checkpoint.sharded`` writes and reads the tensors of such a model.

    Args:
        model: a model with PEER layers.
        optimizer: "rowwise_adagrad", "adagrad", "sgd", or on GPUs "adam".
        lr: its learning rate.
        device: device of the tables; None: the CPU.

    Returns:
        the model, wrapped; its other parameters are left to DDP.

    Raises:
        ValueError: the model has no PEER layer, its width is not a multiple of 4, or another optimizer.

    Example::

        model = shard_tables(model, lr=0.01)
        rest = [p for p in model.parameters() if not hasattr(p, "_in_backward_optimizers")]
        optimizer = torch.optim.AdamW(rest)
    """
    check_name("optimizer", optimizer, list(OPTIMIZERS))
    device = device or torch.device("cpu")
    use_tables(model)
    collections = {n: m for n, m in model.named_modules() if type(m) is EmbeddingCollection}
    if not collections:
        raise ValueError(f"{type(model).__name__} has no layer of PEER experts, whose tables could be sharded")
    for table in (c for m in collections.values() for c in m.embedding_configs()):
        if table.embedding_dim % 4:
            raise ValueError(
                f"PEER's rows are {table.embedding_dim} wide; the kernels of sharded tables take multiples of 4"
            )
    sharder: Any = _Sharder(fused_params={"optimizer": OPTIMIZERS[optimizer], "learning_rate": lr})
    whole = {path: {k: v.clone() for k, v in c.state_dict().items()} for path, c in collections.items()}
    world = dist.get_world_size()
    plans = {
        path: construct_module_sharding_plan(
            collection,
            {name: row_wise(compute_kernel="fused") for name in TABLES},
            sharder=sharder,
            local_size=world,
            world_size=world,
            device_type=device.type,
        )
        for path, collection in collections.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch, about what TorchRec calls
        wrapped = DistributedModelParallel(
            model,
            env=ShardingEnv.from_process_group(dist.GroupMember.WORLD),
            device=device,
            plan=ShardingPlan(plans),
            sharders=[sharder],
        )
    # TorchRec has reinitialized the rows: put back the model's, as one process would have them.
    for path, tables in sharded_tables(model).items():
        for name, value in tables.state_dict().items():
            copy_rows(value, whole[path][name])
    return wrapped


def sharded_tables(model: nn.Module) -> dict[str, ShardedEmbeddingCollection]:
    """Return the sharded collections of a model, by their path."""
    return {n: m for n, m in model.named_modules() if isinstance(m, ShardedEmbeddingCollection)}
