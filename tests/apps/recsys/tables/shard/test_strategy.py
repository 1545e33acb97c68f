"""TorchRecStrategy: two processes with sharded tables train as one process, and their checkpoints serve both.

One spawn runs every scenario of two processes; each test reads the outcome of its own.
"""

import re
import shutil
from pathlib import Path

import pytest
import sharded_runs as runs
import torch
from made_once import made_once
from refusals import refused
from sharded_neurons import batch, layer, train_on_whole_batches
from sharded_runs import COPIES, EXPERTS, SHARDINGS, WORLD, losses, module, train, weights
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from two_ranks import fork

from apps.recsys.tables.columns.embedding import EmbeddingConfig
from apps.recsys.tables.module import MultiTaskRecommender
from apps.recsys.tables.shard import sharding
from apps.recsys.tables.shard.sharding import ShardingConfig
from apps.recsys.tables.shard.strategy import TorchRecStrategy
from apps.train.checkpoint import sharded
from apps.train.sharded.expert_parallel import ExpertParallelStrategy

# Sums of 16 float32 terms in another order are off by some 1e-7 of them; 14 steps at rates of 0.01 and 0.1 add that up.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on one process, then the same on two."""
    return made_once(tmp_path_factory, "sharded_runs", train_all)


def train_all(root: Path) -> None:
    runs.write_table(root / "table.parquet")
    for name, (optimizer, options) in SHARDINGS.items():
        # Whole tables on each process are stepped by the module's optimizer.
        kind = "collection" if options.get("sharding") == "data_parallel" else "fused"
        own = {"fused_lr": options["embedding_lr"]} if "embedding_lr" in options else {}
        train(root, f"one {name}", module(root, kind, options.get("embedding_optimizer", optimizer), **own))
    train(root, "fused one", module(root, "fused"))
    for name, options in COPIES.items():
        train(root, f"one {name}", module(root, "fused", **options))
    for name, (shared, options) in EXPERTS.items():
        train(root, f"one {name}", module(root, "fused", shared=shared), callbacks=[runs.Norms()], **options)
    imported = ["apps.recsys.tables.shard.strategy", "apps.recsys.tables.module"]
    fork(runs.worker, (str(root), runs.free_port()), WORLD, imported)


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]


def assert_same_training(one: Path, two: Path, tolerance: float = TOLERANCE) -> None:
    expected, actual = losses(one), losses(two)
    assert actual.keys() == expected.keys()
    for name, curve in expected.items():
        assert actual[name] == pytest.approx(curve, abs=tolerance), name
    there, here = weights(one), weights(two)
    assert here.keys() == there.keys()
    for name, tensor in there.items():
        error = (here[name] - tensor).abs().max().item()
        assert error <= tolerance * max(1.0, tensor.abs().max().item()), f"{name}: off by {error:.1e}"


@pytest.mark.parametrize("name", [*SHARDINGS, *COPIES])
def test_two_processes_train_as_one_with_the_whole_batch(folder, name):
    assert len(losses(folder / f"one {name}")["train/loss"]) == 14
    assert_same_training(folder / f"one {name}", folder / f"two {name}")


@pytest.mark.parametrize(("name", "steps"), [("routers", 20), ("selection", 7)])
def test_tables_and_experts_of_two_processes_train_as_one(folder, name, steps):
    norms = losses(folder / f"one {name}")["train/norm"]
    assert len(norms) == steps
    assert min(norms) > 0.01  # the tolerance is far below
    assert_same_training(folder / f"one {name}", folder / f"two {name}")


def test_a_run_prints_where_tables_are_and_counts_the_parameters_of_others(ranks):
    lines = ["model.shared: 2 of 4 experts on each of 2 ranks"]
    lines += ["table_city, table_shop, table_tags: row_wise on 2 processes"]
    assert [rank["printed"].splitlines() for rank in ranks] == [2 * lines, []]
    # Rows: 7 cities (6 and the unseen), 33 shops, 6 tags, of 8 floats. Row-wise: 4 and 3, 17 and 16, 3 and 3.
    assert [r["elsewhere row_wise"] for r in ranks] == [8 * (3 + 16 + 3), 8 * (4 + 17 + 3)]
    assert sum(r["elsewhere table_wise"] for r in ranks) == 8 * (7 + 33 + 6)
    assert [r["elsewhere data_parallel"] for r in ranks] == [0, 0]


def test_rows_that_two_processes_cannot_share_evenly_repeat_the_first_in_the_last_step(folder):
    last = runs.LastStep()
    train(folder, "one uneven", module(folder, "fused"), max_epochs=1, subset=runs.UNEVEN, callbacks=[last])
    one, two = (losses(folder / f"{n} uneven")["train/loss"] for n in ("one", "two"))
    assert two[:6] == pytest.approx(one[:6], abs=TOLERANCE)
    assert (last.size, one[6]) == (5, pytest.approx(last.mean, abs=TOLERANCE))
    # 5 rows are left, and the epoch's first comes once more: 3 for each process
    assert two[6] == pytest.approx((5 * last.mean + last.first) / 6, abs=TOLERANCE)
    assert abs(two[6] - one[6]) > 100 * TOLERANCE


def test_the_data_order_the_optimizer_and_columns_under_rowwise_adagrad_would_show(folder):
    # Otherwise the test above could not tell a wrong step from a right one.
    a, b = losses(folder / "one table_wise")["train/loss"], losses(folder / "one auto")["train/loss"]
    assert max(abs(x - y) for x, y in zip(a, b, strict=True)) > 100 * TOLERANCE
    # Each half of a row has the mean square of its own half: documented, and why "auto" does not choose it.
    first = losses(folder / "one table_wise")["train/loss"][:7]
    assert losses(folder / "columns")["train/loss"] != pytest.approx(first, abs=TOLERANCE)


def test_the_tables_of_peer_train_as_on_one_process(folder, ranks):
    start, plain, own = layer(), train_on_whole_batches(), [rank["neurons"] for rank in ranks]
    assert [r["u"].shape[0] for r in own] == [5, 4]
    expected = {"u": plain.experts.u, "v": plain.experts.v}
    for name, table in expected.items():
        rows = torch.cat([r[name] for r in own])
        torch.testing.assert_close(rows, table.detach(), rtol=TOLERANCE, atol=1e-6)
        assert not torch.allclose(rows, getattr(start.experts, name), rtol=0, atol=1e-3)  # the steps would show
        assert torch.equal(sharded.read(folder / "neurons.ckpt")["state_dict"][f"embeddings.{name}.weight"], rows)
    for name, value in plain.router.named_parameters():
        for r in own:
            torch.testing.assert_close(r[f"router.{name}"], value.detach(), rtol=TOLERANCE, atol=1e-6)
    for rank, r in enumerate(own):  # processes with other numbers of tokens
        y = plain(batch(9)[: 1 + rank]).detach().flatten(0, 1)
        torch.testing.assert_close(r["output"], y, rtol=TOLERANCE, atol=1e-6)


@pytest.mark.parametrize("stop", ["epoch", "middle"])
def test_a_resumed_run_ends_where_an_unbroken_one_does(folder, stop):
    there, here = weights(folder / "two row_wise"), weights(folder / f"resumed {stop}")
    assert there.keys() == here.keys()
    assert [name for name in there if not torch.equal(there[name], here[name])] == []
    steps = {"epoch": 7, "middle": 10}[stop]
    unbroken = losses(folder / "two row_wise")["train/loss"]
    assert losses(folder / f"resumed {stop}")["train/loss"] == unbroken[steps:]


def test_other_shards_another_number_of_processes_and_other_divisions_go_on_from_a_checkpoint(folder, alone):
    assert losses(folder / "resumed table_wise")["train/loss"] == pytest.approx(
        losses(folder / "two row_wise")["train/loss"][10:], abs=TOLERANCE
    )
    path = folder / "two row_wise" / "middle.ckpt"
    train(folder, "resumed alone", module(folder), TorchRecStrategy(), ckpt_path=path)
    unbroken = losses(folder / "one table_wise")["train/loss"]
    # The loader counts batches a process: 10 of 2 x 8 rows are 10 of 16.
    assert losses(folder / "resumed alone")["train/loss"] == pytest.approx(unbroken[10:], abs=TOLERANCE)
    runs.go_on_with_experts(folder, "alone", TorchRecStrategy())
    unbroken = losses(folder / "two routers")
    for run in ("whole", "alone"):
        there = losses(folder / run)
        for name in ("train/loss", "train/norm"):
            assert there[name] == pytest.approx(unbroken[name][10:], abs=TOLERANCE)


@pytest.fixture
def alone():
    """The process group of a strategy on one process ends with the test."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_one_process_goes_on_from_shards_but_not_of_columns_under_rowwise_adagrad(folder, alone):
    options = {"max_epochs": 1, "limit_train_batches": 1}
    train(folder, "no tables", module(folder, "joined"), ExpertParallelStrategy(expert_parallel_size=1), **options)
    torch.distributed.destroy_process_group()
    path = folder / "no tables" / "last.ckpt"
    assert sharded.is_sharded(path)
    fitter = train(folder, "gone on", module(folder, "joined"), ckpt_path=path, **options | {"max_epochs": 2})
    assert fitter.global_step == 2
    fitter = train(folder, "short", module(folder), TorchRecStrategy(), max_epochs=1, limit_train_batches=1)
    loops = (fitter.fit_loop.epoch_loop.val_loop, fitter.validate_loop, fitter.test_loop, fitter.predict_loop)
    assert not any(loop.inference_mode for loop in loops)
    path = folder / "columns" / "last.ckpt"
    strategy = TorchRecStrategy(sharding="column_wise")
    message = runs.complaint(lambda: train(folder, "bad", module(folder), strategy, ckpt_path=path))
    # Two halves of the columns have a number a row each: 2 x 7 rows of cities.
    assert "written by 2 processes, does not fit this run's shards: state/" in message
    assert "is (14,) there and (7,) here" in message


@pytest.mark.parametrize("name", ["shards", "file"])
def test_two_processes_test_any_checkpoint(folder, ranks, name):
    path = folder / {"shards": "two row_wise", "file": "fused one"}[name] / "last.ckpt"
    columns = runs.Importances()
    tester = runs.trainer(folder, callbacks=[columns])
    net = module(folder, "collection" if name == "shards" else "fused")
    tester.test(net, datamodule=runs.data(folder), ckpt_path=path, weights_only=True, verbose=False)
    assert len(columns.found) > 3
    for rank in ranks:
        for key, value in rank[f"test {name}"].items():
            assert float(tester.callback_metrics[key]) == pytest.approx(value, abs=TOLERANCE), key
        for there, here in zip(rank[f"columns {name}"], columns.found, strict=True):
            assert there == pytest.approx(here, abs=TOLERANCE)


def test_a_module_is_built_from_shards_and_does_not_train_on_from_them_alone(folder):
    net = MultiTaskRecommender.load_from_checkpoint(folder / "two row_wise" / "last.ckpt")
    actual, expected = net.state_dict(), weights(folder / "two row_wise")
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    path = folder / "two row_wise" / "last.ckpt"
    message = runs.complaint(lambda: train(folder, "bad", module(folder), ckpt_path=path))
    assert "the checkpoint's tables are sharded: training continues from it with trainer.strategy=" in message


def test_a_checkpoint_keeps_one_set_of_shards_and_its_shapes_are_read_without_them(folder, tmp_path):
    path = shutil.copytree(folder / "two row_wise" / "last.ckpt", tmp_path / "last.ckpt")
    for file in path.glob("shards-*/*.distcp"):
        file.unlink()
    actual, expected = sharded.read(path, device="meta")["state_dict"], weights(folder / "two row_wise")
    assert {k: v.shape for k, v in actual.items()} == {k: v.shape for k, v in expected.items()}
    assert [p.name[:9] for p in sorted(path.iterdir())] == ["checkpoin", "shards-14"]
    runs.AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, path)
    assert path.is_file()


def test_deferred_tables_start_alike_each_time_and_need_the_strategy(folder):
    first, second = weights(folder / "deferred first"), weights(folder / "deferred second")
    assert all(torch.equal(first[name], second[name]) for name in first)
    tables = {name: t for name, t in first.items() if ".table_" in name}
    assert len(tables) == 3
    for name, table in tables.items():
        assert not table[0].any(), name
        assert table[1:].any(1).all(), name
    shop = first["model.sparse.collection.embedding_bags.table_shop.weight"][1:]
    # 32 x 8 draws of N(0, 0.3): the standard error of their deviation is 0.3 / sqrt(512) = 0.013.
    assert float(shop.std()) == pytest.approx(0.3, abs=0.05)
    # The halves of two processes are draws of their own.
    assert not torch.equal(shop[:8], shop[16:24])
    message = runs.complaint(lambda: train(folder, "bad", module(folder, deferred=True)))
    assert message.startswith("ValueError: embedding.deferred=True leaves the tables to trainer.strategy=")
    with pytest.raises(ValueError, match=r"embedding.deferred=True needs kind='collection', not 'fused'"):
        EmbeddingConfig("fused", deferred=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("joined", "finds no tables to shard: embedding.kind='joined' is one tensor; set model.embedding.kind='collec"),
        ("too large", "the tables do not fit: .* for 2 processes of 9.31e-10 GiB each with sharding auto: take more"),
        ("column", "table_sharding names 'town', which is no embedded column: city, shop, tags"),
        ("clip", "trainer.gradient_clip_val=1.0 does not reach: set it to null"),
        ("accumulate", "trainer.accumulate_grad_batches=2 does not reach: set it to 1"),
        ("scaled", "trainer.precision='16-mixed' has scaled up: take 'bf16-mixed'"),
        ("average", "keeps no moving average of sharded tables: set model.ema_decay=null"),
        ("uvm", "compute_kernel='fused_uvm' needs a GPU"),
        ("adam", "embedding_optimizer='adam' needs a GPU"),
        ("width", "table_city is 6 wide; the kernels of sharded tables take multiples of 4"),
        ("greedy",
         "configure_optimizers of TakesAll takes .*table_city.weight, whose rows are stepped in the backward"),
        ("mesh", "experts=3 does not divide the 2 ranks"),
        ("dense gates", "layer 'model.shared', MultiGateMoE, has experts that cannot be sharded over ranks"),
        ("three experts", "layer 'model.shared' has 3 experts .*, which 2 ranks do not divide"),
        ("gradients", "weighting.kind='gradnorm' needs the gradient of every expert on each process"),
        ("another model", "process 1 has another model.* than process 0: all of them need the same"),
        ("resume a file", "last.ckpt is not sharded: its optimizer's state is of other parameters"),
    ],
)  # fmt: skip
def test_bad_input_is_a_line_on_every_process(ranks, name, message):
    for rank in ranks:
        assert rank[name].startswith("ValueError: ")
        assert "\n" not in rank[name]
        assert re.search(message, rank[name]), rank[name]


class Ids(nn.Module):
    """One table on the meta device."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        table = EmbeddingBagConfig(name="ids", embedding_dim=dim, num_embeddings=rows, feature_names=["id"])
        self.collection = EmbeddingBagCollection(tables=[table], device=torch.device("meta"))


def planned(how: str, memory_gib: float, rows: int = 10**9, dim: int = 64, world: int = 128) -> list:
    config, shard = ShardingConfig(how, memory_gib=memory_gib), sharding.sharder("rowwise_adagrad", 0.1)
    processes = sharding.Processes(world, min(world, 8), torch.device("cuda"))
    plan = sharding.local_plan(Ids(rows, dim), config, shard, processes, 1024)
    return plan.plan["collection"]["ids"].sharding_spec.shards


def test_tables_of_any_size_are_planned_without_an_empty_part_or_refused():
    # 128 GPUs, 8 a node. Row-wise 10^9 / 128 rows each, on one node 10^9 / 8; in columns 64 / 4 = 16 shards of 4.
    assert [tuple(s.shard_sizes) for s in planned("row_wise", 64)] == [(7_812_500, 64)] * 128
    assert [tuple(s.shard_sizes) for s in planned("table_row_wise", 64)] == [(125_000_000, 64)] * 8
    assert [tuple(s.shard_sizes) for s in planned("column_wise", 64)] == [(10**9, 4)] * 16
    assert [tuple(s.shard_sizes) for s in planned("column_wise", 64, 10**6, 64, 2)] == [(10**6, 32)] * 2
    # 10^9 x 64 x 4 bytes = 238.4 GiB on one GPU.
    refused(r"do not fit: 238 GiB of weights \(the largest, ids, 238\).* table_wise", lambda: planned("table_wise", 64))
    # 4 processes share 5 rows as 2, 2, 1 and 0, and 7 as 2, 2, 2 and 1.
    shard, processes = sharding.sharder("rowwise_adagrad", 0.1), sharding.Processes(4, 4, torch.device("cpu"))
    plan = sharding.local_plan(Ids(5, 8), ShardingConfig(), shard, processes, 1024)
    assert plan.plan["collection"]["ids"].sharding_type == "table_wise"
    with pytest.raises(ValueError, match="ids has 5 rows, of which row_wise leaves a process none"):
        sharding.local_plan(Ids(5, 8), ShardingConfig("row_wise"), shard, processes, 1024)
    plan = sharding.local_plan(Ids(7, 8), ShardingConfig("row_wise"), shard, processes, 1024)
    sizes = [tuple(s.shard_sizes) for s in plan.plan["collection"]["ids"].sharding_spec.shards]
    assert sizes == [(2, 8), (2, 8), (2, 8), (1, 8)]
