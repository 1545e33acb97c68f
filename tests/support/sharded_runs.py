"""A small table, and training runs on it: on one process, or as one of two gloo processes with sharded tables."""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import os
import socket
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from divided_runs import complaint
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision
from sharded_neurons import train_on_a_part

import core
from apps.recsys.schema import SplitConfig, TableConfig, TaskConfig
from apps.recsys.tables.columns.bottoms import SingleTask
from apps.recsys.tables.columns.embedding import EmbeddingConfig
from apps.recsys.tables.data import TableData
from apps.recsys.tables.module import MultiTaskRecommender
from apps.recsys.tables.negatives.weighting import WeightingConfig
from apps.recsys.tables.shard.strategy import TorchRecStrategy
from apps.recsys.tables.tasks import HeadConfig
from apps.train.checkpoint import sharded
from apps.train.checkpoint.checkpoints import AtomicCheckpointIO
from apps.train.checkpoint.resume import GeneratorState
from apps.train.step.module import OptimizerConfig
from apps.train.watch.logs import MetricsCSV
from core.parallel import total_norm

WORLD = 2
BATCH = 16  # of all processes together
SHOPS = 33  # an odd number: rows do not split evenly
TABLE = TableConfig(
    categorical=("city", "shop"),
    multi_valued=("tags",),
    continuous=("age",),
    tasks={"click": TaskConfig("click"), "buy": TaskConfig("buy")},
    hash_rows={"shop": SHOPS},
    split=SplitConfig("random", val=0.2, test=0.2),
)


SMOOTH = core.MLP((8,), activation="silu")


def write_table(path: Path, num: int = 160) -> None:
    """Write 160 rows: 102 of them train (6 batches and 6 rows), 26 validate and 32 test; these numbers are even."""
    random = np.random.RandomState(0)
    city, shop, age = random.randint(0, 6, num), random.randint(0, 200, num), random.standard_normal(num)
    tags = ["|".join(map(str, random.randint(0, 5, random.randint(0, 4)))) for _ in range(num)]
    click = age + (city % 3) - 1 + random.standard_normal(num) > 0
    buy = click & (random.random_sample(num) < 0.5)
    columns = {"city": [f"c{c}" for c in city], "shop": shop, "tags": tags, "age": age, "click": click, "buy": buy}
    pq.write_table(pa.table(columns), path)


UNEVEN = 101  # rows: the last of 7 batches has 5


def data(folder: Path, world: int = 1, subset: int | None = None) -> TableData:
    return TableData(
        "table",
        cache_dir=str(folder / "cache"),
        train_file=str(folder / "table.parquet"),
        table=TABLE,
        batch_size=BATCH // world,
        eval_batch_size=32 // world,
        subset=subset,
        seed=0,
    )


def sparse(selection: Literal["task", "shared"] = "task", num_experts: int = 4) -> core.MMoE:
    """Return a layer whose routers choose two experts an example, for each task or for all of them."""
    return core.MMoE(
        num_experts, SMOOTH, core.TokenChoice(2), selection=selection, balance=core.Balance(importance=0.1)
    )


def module(folder: Path, kind: str = "collection", optimizer: str = "rowwise_adagrad", **options: Any) -> Any:
    """Return a model with a balance loss; ``options`` go to the embedding, except the module's own.

    Nothing has a kink: at the one of a ReLU, rounding decides between two gradients.
    """
    own = {k: options.pop(k) for k in ("ema_decay", "num_members", "shared", "weighting") if k in options}
    torch.manual_seed(0)
    return MultiTaskRecommender(
        features=data(folder).features,
        **{"shared": core.MMoE(4, SMOOTH, balance=core.Balance(importance=0.1)), **own},
        embedding=EmbeddingConfig(
            kind,
            fused_optimizer=optimizer,
            **{"dim": 8, "init_std": 0.3, "fused_lr": 0.1, "weight_decay": True, **options},
        ),
        head=HeadConfig(activation="silu"),
        # A large eps: Adam would blow up the rounding of gradients that are nearly 0.
        optimizer=OptimizerConfig(lr=0.01, eps=1e-3, warmup_steps=2, schedule="constant"),
        report=None,
    )


def trainer(folder: Path, strategy: Any = "auto", world: int = 1, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy,
        default_root_dir=str(folder),
        logger=options.pop("logger", False),
        callbacks=[GeneratorState(), *options.pop("callbacks", [])],
        plugins=[AtomicCheckpointIO(), *options.pop("plugins", [])],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=True,
        **{"max_epochs": 2, "log_every_n_steps": 1, "num_sanity_val_steps": 0, **options},
    )


def losses(run: Path) -> dict[str, list[float]]:
    """Return the columns of the run's log that do not depend on the number of processes."""
    with open(run / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    measured = ("train/examples_per_second", "train/peak_memory_mib")
    names = [n for n in rows[0] if n.startswith(("train/", "val/")) and "routing" not in n and n not in measured]
    return {name: [float(row[name]) for row in rows if row[name]] for name in names}


def train(folder: Path, run: str, net: Any, strategy: Any = "auto", world: int = 1, **options: Any) -> Trainer:
    """Fit, with the log in ``folder/run`` and the checkpoint in ``folder/run/last.ckpt``."""
    resumed, subset = options.pop("ckpt_path", None), options.pop("subset", None)
    to = folder / run
    to.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitter = trainer(to, strategy, world, logger=MetricsCSV(str(to)), **options)
        fitter.fit(net, datamodule=data(folder, world, subset), ckpt_path=resumed, weights_only=True)
        fitter.save_checkpoint(to / "last.ckpt")
    return fitter


class Saves(Callback):
    """The callback writes ``epoch.ckpt`` after the first epoch and ``middle.ckpt`` after step 10 of 14."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 10:
            trainer.save_checkpoint(self.folder / "middle.ckpt")

    def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.folder / "epoch.ckpt")


class Norms(Callback):
    """The callback logs the norm of all gradients but those of the tables, as ``train/norm``."""

    def on_before_optimizer_step(self, trainer: Trainer, net: Any, optimizer: Any) -> None:
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        norm = total_norm(grads) if dist.is_initialized() else torch.nn.utils.get_total_norm(grads)
        net.log("train/norm", norm)


class Importances(Callback):
    """The callback keeps what a test's report says of the columns, as ``found``."""

    def on_test_epoch_end(self, trainer: Trainer, net: Any) -> None:
        self.found = net.importances(trainer.datamodule)  # type: ignore[attr-defined]


class LastStep(Callback):
    """The losses before the last step of the first epoch: ``mean`` of its batch, ``first`` of the epoch's first row."""

    def on_train_batch_start(self, trainer: Trainer, net: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.first_index = batch.index_B[0]
        if batch_idx == 6:
            rows = trainer.datamodule.rows("train")  # type: ignore[attr-defined]
            row = rows.__getitems__((rows.index == self.first_index).nonzero()[0])
            self.size = len(batch)
            with torch.no_grad():
                self.mean, self.first = (float(net.task_loss(b).loss) for b in (batch, row))


# ---- the work of two processes

SHARDINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "table_wise": ("rowwise_adagrad", {"sharding": "table_wise"}),
    "row_wise": ("rowwise_adagrad", {"sharding": "row_wise"}),
    "auto": ("adagrad", {}),
    "column_wise": ("adagrad", {"sharding": "column_wise"}),
    "mixed": ("sgd", {"sharding": "row_wise", "table_sharding": {"shop": "column_wise", "city": "table_wise"}}),
    "own optimizer": ("sgd", {"embedding_optimizer": "rowwise_adagrad", "embedding_lr": 0.05, "sharding": "row_wise"}),
    "data_parallel": ("rowwise_adagrad", {"sharding": "data_parallel"}),
}


# An ensemble and single-task networks have several tables of one name, which lie side by side.
COPIES: dict[str, dict[str, Any]] = {"members": {"num_members": 2}, "copies": {"shared": SingleTask(expert=SMOOTH)}}


# Layers whose experts are divided, and how long they train.
EXPERTS: dict[str, tuple[core.MMoE, dict[str, Any]]] = {
    "routers": (sparse("task"), {"max_epochs": 3, "max_steps": 20}),
    "selection": (sparse("shared"), {"max_epochs": 1}),
}


def worker(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning").setLevel(logging.ERROR)
    # Lightning's own launcher sets these.
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    root = Path(folder)
    results: dict[str, Any] = {}
    for name, (optimizer, options) in SHARDINGS.items():
        net = module(root, optimizer=optimizer)
        # Those of the others are never read, and a sharded checkpoint takes longer to write than an epoch.
        saves = [Saves(root / "two row_wise")] if name == "row_wise" else []
        train(root, f"two {name}", net, TorchRecStrategy(**options), WORLD, callbacks=saves)
        results[f"elsewhere {name}"] = net.trainer.strategy.num_params_elsewhere
    train(root, "two uneven", module(root), TorchRecStrategy(), WORLD, max_epochs=1, subset=UNEVEN)
    results |= _with_experts(root) | _resumed(root) | _tested(root) | _refused(root)
    _fit_deferred(root)
    _fit_copies(root)
    results["neurons"] = train_on_a_part(root / "neurons.ckpt")
    torch.save(results, root / f"rank{rank}.pt")
    dist.barrier()


def _with_experts(root: Path) -> dict[str, Any]:
    """Train with divided experts, and go on from one such run with whole ones; return what is printed first."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for name, (shared, options) in EXPERTS.items():
            callbacks = [Norms(), *([Saves(root / "two routers")] if name == "routers" else [])]
            strategy = TorchRecStrategy("row_wise", expert_parallel_size=2)
            train(root, f"two {name}", module(root, shared=shared), strategy, WORLD, callbacks=callbacks, **options)
    go_on_with_experts(root, "whole", TorchRecStrategy(), WORLD)
    return {"printed": printed.getvalue()}


def go_on_with_experts(root: Path, run: str, strategy: TorchRecStrategy, world: int = 1) -> None:
    """Go on from step 10 of the run whose experts two processes shared."""
    shared, options = EXPERTS["routers"]
    path = root / "two routers" / "middle.ckpt"
    train(root, run, module(root, shared=shared), strategy, world, callbacks=[Norms()], ckpt_path=path, **options)


def _resumed(root: Path) -> dict[str, Any]:
    for stop in ("epoch", "middle"):
        path = root / "two row_wise" / f"{stop}.ckpt"
        strategy = TorchRecStrategy(sharding="row_wise")
        train(root, f"resumed {stop}", module(root), strategy, WORLD, ckpt_path=path)
    train(root, "columns", module(root), TorchRecStrategy(sharding="column_wise"), WORLD, max_epochs=1)
    train(root, "resumed table_wise", module(root), TorchRecStrategy(sharding="table_wise"), WORLD, ckpt_path=path)
    one = root / "fused one" / "last.ckpt"  # of one process
    strategy = TorchRecStrategy(sharding="row_wise")
    return {"resume a file": complaint(lambda: train(root, "bad", module(root), strategy, WORLD, ckpt_path=one))}


def _tested(root: Path) -> dict[str, Any]:
    metrics = {}
    for name, path in (("shards", root / "two row_wise" / "last.ckpt"), ("file", root / "fused one" / "last.ckpt")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            columns = Importances()
            tester = trainer(root, TorchRecStrategy(sharding="table_wise"), WORLD, callbacks=[columns])
            tester.test(module(root), datamodule=data(root, WORLD), ckpt_path=path, weights_only=True, verbose=False)
        metrics[f"test {name}"] = {k: float(v) for k, v in tester.callback_metrics.items() if "routing" not in k}
        metrics[f"columns {name}"] = columns.found
    return metrics


def _refused(root: Path) -> dict[str, Any]:
    def fit(net: Any, options: dict[str, Any] | None = None, **of_trainer: Any) -> str:
        return complaint(lambda: train(root, "bad", net, TorchRecStrategy(**options or {}), WORLD, **of_trainer))

    class TakesAll(MultiTaskRecommender):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    halves = {"expert_parallel_size": 2}
    by_gradients = module(root, shared=sparse(), weighting=WeightingConfig("gradnorm"))
    greedy = TakesAll(features=data(root).features, embedding=EmbeddingConfig("collection", dim=8), report=None)
    return {
        "joined": fit(module(root, "joined")),
        "too large": fit(module(root), {"memory_gib": 1e-9}),
        "column": fit(module(root), {"table_sharding": {"town": "row_wise"}}),
        "clip": fit(module(root), gradient_clip_val=1.0),
        "accumulate": fit(module(root), accumulate_grad_batches=2),
        "scaled": fit(module(root), plugins=[MixedPrecision("16-mixed", "cpu")]),
        "average": fit(module(root, ema_decay=0.9)),
        "uvm": fit(module(root), {"compute_kernel": "fused_uvm"}),
        "adam": fit(module(root), {"embedding_optimizer": "adam"}),
        "width": fit(module(root, dims={"city": 6})),
        "greedy": fit(greedy),
        "mesh": fit(module(root, shared=sparse()), {"expert_parallel_size": 3}),
        "dense gates": fit(module(root), halves),
        "three experts": fit(module(root, shared=sparse(num_experts=3)), halves),
        "gradients": fit(by_gradients, halves),
        "another model": fit(module(root, dim=4 + 4 * dist.get_rank())),
    }


def _fit_deferred(root: Path) -> None:
    """Fit twice from tables that were never whole: the start is the same each time."""
    for name in ("first", "second"):
        net = module(root, deferred=True)
        train(root, f"deferred {name}", net, TorchRecStrategy(sharding="row_wise"), WORLD, limit_train_batches=0)


def _fit_copies(root: Path) -> None:
    for name, options in COPIES.items():
        train(root, f"two {name}", module(root, **options), TorchRecStrategy(), WORLD)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Return the state dict of a checkpoint, which is a file or a folder."""
    path = run / "last.ckpt"
    checkpoint = sharded.read(path) if sharded.is_sharded(path) else torch.load(path, weights_only=True)
    return checkpoint["state_dict"]
