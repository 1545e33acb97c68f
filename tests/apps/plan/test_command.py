"""Whole plans of small configurations, held to the model and to the exchange as it is built."""

from __future__ import annotations

import csv
import dataclasses
import math
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import yaml
from commands import fails
from torch.distributed.device_mesh import init_device_mesh

import core
from apps.cli import main
from apps.plan.formulas import count_bytes, exchanged_bytes
from apps.plan.layout import Layout, cost, layouts, sweep
from apps.plan.options import PlanOptions
from apps.plan.outline import outlined
from apps.train.sharded.expert_parallel import ExpertParallelStrategy
from core.parallel import AllToAllDispatcher, routes

DIGITS = ("--config", "configs/vision/digits_vmoe.yaml", "--gpu", "h100")
TEXT = ("--config", "configs/nlp/text_mixtral_like.yaml", "--gpu", "h100")
TABLE = ("--config", "configs/recsys/ten_million_rows.yaml", "--config", "configs/parallel/torchrec.yaml")


def options(*argv: str) -> PlanOptions:
    return PlanOptions.read(argv)


@pytest.fixture(scope="module")
def text():
    given = options(*TEXT, "--gpus", "16")
    return outlined(given), given


@pytest.mark.usefixtures("drawn")
def test_the_command_prints_a_plan_and_writes_an_overlay_that_a_strategy_takes(tmp_path, capsys):
    assert main(["plan", *DIGITS, "--gpus", "16", "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "VisionClassifier: 399,050 parameters, 2 MoE layers of 8 experts with 128 hidden units" in shown
    assert "a GPU's batch: 64 examples" in shown
    assert "memory fits everywhere" in shown
    overlay = yaml.safe_load((tmp_path / "overlay.yaml").read_text())["trainer"]
    assert overlay["devices"] * overlay["num_nodes"] == 16
    strategy = ExpertParallelStrategy(**overlay["strategy"]["init_args"])
    sizes = (
        int(strategy.expert_parallel_size),
        strategy.fsdp_size,
        strategy.nodes,
        strategy.expert_tensor_parallel_size,
    )
    assert 16 % math.prod(sizes) == 0
    with open(tmp_path / "plan.csv") as file:
        rows = list(csv.DictReader(file))
    # 8 experts among 16 GPUs; 16 share out the hidden units of each expert.
    assert [row["degree"] for row in rows] == ["1", "2", "4", "8", "16"]
    assert rows[-1]["mesh"] in ("1 x 1 x 1 x 8 x 2", "1 x 1 x 2 x 4 x 2")
    assert [row["best"] for row in rows].count("*") == 1


def test_a_rank_holds_its_part_of_weights_gradients_and_optimizer(text):
    outline, given = text
    experts, rest = (sum(getattr(b, part).params for b in outline.parts) for part in ("experts", "rest"))
    # Four layers of 8 experts of three matrices 128 x 192.
    assert experts == 4 * 8 * 3 * 128 * 192
    assert experts + rest == outline.num_params
    for layout, held in (
        (Layout(replicas=16), experts + rest),
        (Layout(replicas=4, experts=4), experts / 4 + rest),
        (Layout(replicas=2, experts=4, hidden=2), experts / 8 + rest),
        (Layout(replicas=2, shards=2, experts=4, rest="shard"), experts / 8 + rest / 8),
    ):
        memory = cost(outline, given, layout).memory
        assert memory.weights == pytest.approx(4 * held)
        assert memory.gradients == pytest.approx(4 * held)
        assert 4 * held < memory.optimizer < 8 * held  # Muon keeps one number of a matrix, AdamW two of the rest


def test_checkpointing_and_half_precision_keep_less():
    kept, seconds = {}, {}
    words = {"full": (), "half": ("--param_dtype", "bfloat16"), "again": ("--activation_checkpointing",)}
    for name, more in words.items():
        given = options(*TEXT, "--gpus", "16", *more)
        one = cost(outlined(given), given, Layout(replicas=2, experts=8))
        kept[name], seconds[name] = one.memory.activations, one.compute
    assert kept["half"] < 0.65 * kept["full"]  # routers keep float32
    assert kept["again"] < 0.3 * kept["full"]
    assert seconds["again"] == pytest.approx(4 / 3 * seconds["full"])


@pytest.mark.parametrize(
    "more, precision, peak",
    [
        ((), "bf16-mixed", 989),
        (("--precision", "32-true"), "32-true", 494.5),
        (("--trainer.precision", "32", "--float32_matmul_precision", "highest"), "32-true", 67),
        (("--precision", "32-true", "--param_dtype", "bfloat16"), "32-true", 989),
        (("--precision", "32-true", "--tflops", "50"), "32-true", 50),
    ],
)
def test_the_peak_is_that_of_the_products_as_fit_computes_them(more, precision, peak):
    given = options(*DIGITS, "--gpus", "8", *more)
    assert (given.precision, given.rate / 1e12) == (precision, pytest.approx(peak))


def test_autocast_keeps_a_copy_of_the_experts_that_are_here():
    given = options(*TEXT, "--gpus", "16", "--precision", "bf16-mixed")
    outline = outlined(given)
    experts, kept = sum(b.experts.params for b in outline.parts), sum(b.kept for b in outline.parts)
    assert cost(outline, given, Layout(replicas=16)).memory.activations == pytest.approx(kept + 2 * experts)
    # Of four layers: 8,192 rows of 128 numbers that come in, in bfloat16, with six indices.
    rows = 4 * 8192 * (128 * 2 + 48)
    memory = cost(outline, given, Layout(replicas=2, experts=8)).memory
    assert memory.activations == pytest.approx(kept + 2 * experts / 8 + rows)


def test_the_traffic_is_that_of_the_exchange_as_it_is_built(monkeypatch, tmp_path):
    sent = {"rows": 0, "counts": 0}

    class Exchanged(torch.autograd.Function):
        @staticmethod
        def forward(ctx, rows):
            sent["rows"] += rows.nbytes
            return rows.clone()

        @staticmethod
        def backward(ctx, grad):
            sent["rows"] += grad.nbytes
            return grad

    def exchanged(count_W, group):
        sent["counts"] += count_W.nbytes
        return count_W

    monkeypatch.setattr(routes, "all_to_all", lambda rows, *_: Exchanged.apply(rows))
    monkeypatch.setattr(routes, "_exchanged", exchanged)
    E, K, T, D = 4, 2, 10, 8
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=60))
    try:
        layer = core.MoEConfig(E, core.TokenChoice(top_k=K), core.FFN(hidden_dim=16)).build(D)
        layer.dispatcher = AllToAllDispatcher(init_device_mesh("cpu", (1,)))
        layer(torch.randn(1, T, D, requires_grad=True)).sum().backward()
    finally:
        dist.destroy_process_group()
    assert sent["rows"] == exchanged_bytes(T * K, D, D, dtype_bytes=4)
    assert sent["counts"] == count_bytes(E)


def test_the_exchange_of_a_plan_counts_every_layer(text):
    outline, given = text
    one = cost(outline, given, Layout(replicas=2, experts=8))
    # 32 texts of 128 tokens, two experts each, in four layers: 7/8 leave a rank, all within its node.
    rows = 4 * (exchanged_bytes(32 * 128 * 2, 128, 128, 4) + count_bytes(8))
    assert one.traffic["experts"].within == pytest.approx(rows * 7 / 8)
    assert one.traffic["experts"].between == 0
    # All but the experts is summed over all ranks, and each expert over two, which are on two nodes.
    experts = sum(b.experts.params for b in outline.parts)
    rest = outline.num_params - experts
    total = 2 * 4 * (rest * 15 / 16 + experts / 8 / 2)
    assert one.traffic["gradients"].total == pytest.approx(total)
    assert one.traffic["parameters"].total == 0


def test_a_static_all_to_all_sends_every_place_of_the_capacity():
    sent = []
    for more in ((), ("--static_all_to_all",)):
        given = options(*TEXT, "--gpus", "8", "--model.moe.capacity_factor", "1.5", *more)
        sent.append(cost(outlined(given), given, Layout(experts=8)).traffic["experts"].within)
    assert sent[1] == pytest.approx(1.5 * sent[0], rel=1e-4)  # the counts stay


def test_layouts_fill_the_gpus_and_the_best_one_is_the_fastest_that_fits(text):
    outline, given = text
    found = list(layouts(outline, 16, 8))
    assert {layout.ranks for layout in found} == {16}
    assert len(set(found)) == len(found)
    plan = sweep(outline, given)
    assert plan.best.seconds == min(c.seconds for c in plan.costs)
    assert plan.breaks()[0] == "memory fits everywhere"
    least = min(cost(outline, given, layout).memory.total for layout in found)
    for limit, fits in ((1.001 * least, True), (0.999 * least, False)):
        tight = dataclasses.replace(given, memory=limit / 1e9, usable_memory=1.0)
        plan = sweep(outline, tight)
        assert plan.best.memory.total == pytest.approx(least, rel=1e-3)
        assert plan.best.fits == fits
        assert plan.breaks()[0].startswith("memory does not fit at degree")


def planned(capsys, *argv):
    """Return what the command prints, and the strategy of its overlay."""
    assert main(["plan", *argv]) == 0
    shown = capsys.readouterr().out
    return shown, yaml.safe_load(shown[shown.index("trainer:") :])["trainer"]["strategy"]


def test_models_without_moe_layers_and_a_billion_rows_are_planned(capsys):
    shown, strategy = planned(capsys, *DIGITS, "--gpus", "8", "--model.moe", "null")
    assert "no MoE layer: FSDP2 or DDP alone" in shown
    assert strategy["init_args"]["expert_parallel_size"] == 1
    billion = ("--tables", "1000000000", "--model.embedding.dim", "64")
    shown, strategy = planned(capsys, *TABLE, "--gpus", "128", "--gpu", "h100", *billion)
    assert "memory does not fit at table_wise" in shown
    assert strategy["class_path"] == "TorchRecStrategy"
    assert strategy["init_args"]["sharding"] in ("row_wise", "table_row_wise")


def test_images_with_texts_and_a_table_with_domains_are_planned(capsys):
    # 64 pairs of 16 patches and 20 pieces.
    shapes = ("--config", "configs/multimodal/shapes.yaml", "--gpu", "h100", "--gpus", "4")
    outline = outlined(options(*shapes, "--batch", "64", "--length", "20", "--data.tokenizer.vocab_size", "500"))
    assert outline.trial.examples == 64
    assert outline.trial.tokens == 64 * 36
    assert outlined(options(*shapes, "--tokens_per_gpu", "2304", "--length", "20")).trial.examples == 64
    star = ("--config", "configs/recsys/movielens_1m_star.yaml", "--gpus", "8", "--gpu", "h100", "--tables", "60", "40")
    assert main(["plan", *star, "--tasks", "2", "--domains", "7"]) == 0
    assert "strategy" in capsys.readouterr().out
    assert "domain_dim=16 goes by the domain" in fails(capsys, 1, "plan", *star)


@pytest.mark.parametrize(
    "code, argv, line",
    [
        (2, (*DIGITS[:2], "--memory", "80"), "or give --tflops, --node_bandwidth, --network_bandwidth"),
        (2, (*DIGITS, "--speed", "2"), "speed does not exist"),
        (2, ("--config", "configs/debug.yaml", "--gpu", "h100"), "names no model"),
        (2, (*TABLE, "--gpu", "h100"), "give --tables ROWS ..., and --numbers N"),
        (2, (*TEXT, "--static_all_to_all"), "give --model.moe.capacity_factor N"),
        (2, (*DIGITS, "--data.dataset", "null"), "give --model.image_size N"),
        (1, (*DIGITS[:2], "--gpu", "h10"), "gpu='h10' is not one of a100"),
        (1, (*DIGITS, "--gpus", "12"), "gpus=12 is not a multiple of gpus_per_node=8"),
        (1, (*DIGITS, "--gpus", "0"), "gpus=0 must be at least 1"),
        (1, (*DIGITS, "--precision", "8-bit"), "precision='8-bit' is not one of"),
        (1, (*DIGITS, "--efficiency", "2"), "efficiency=2 must lie in (0, 1]"),
        (1, (*TEXT, "--batch", "2", "--tokens_per_gpu", "256"), "say the same: give one of them"),
        (1, (*TEXT, "--tokens_per_gpu", "200"), "is not a multiple of an example's 128 tokens"),
        (1, (*TEXT, "--model.moe.num_expert", "4"), "num_expert"),
    ],
)
def test_wrong_usage_or_a_wrong_value_is_one_line(code, argv, line, capsys):
    assert line in fails(capsys, code, "plan", "--gpus", "8", *argv)


def test_a_table_of_the_command_is_whole_in_80_columns(capsys):
    flags = ("--gpus", "512", "--batch", "1", "--model.moe.num_experts", "64", "--param_dtype", "bfloat16")
    assert main(["plan", *TEXT, *flags]) == 0
    out = capsys.readouterr().out
    assert "…" not in out
    assert max(len(line) for line in out.splitlines() if line.startswith(("│", "┃"))) <= 80


def test_gates_before_blocks_leave_experts_divisible_and_a_captioner_goes_by_the_length_of_its_texts():
    histories = ("--config", "configs/recsys/movielens_1m_next_item.yaml", "--model.num_items", "3706")
    outline = outlined(options(*histories, "--gpu", "h100", "--gpus", "8"))
    assert outline.undivided is None
    assert [layer.num_experts for layer in outline.layers.values()] == [8, 8]
    # Its data give the vocabulary; 64 images of the configuration, with 10 ids each.
    argv = ("--config", "configs/multimodal/shapes_captions.yaml", "--gpus", "2", "--gpu", "h100", "--length", "10")
    given = options(*argv, "--data.tokenizer.vocab_size", "629")
    outline = outlined(given)
    assert outline.kind == "ImageCaptioner"
    assert list(outline.layers) == ["model.decoder.layers.1.ffn"]
    assert (outline.trial.examples, outline.trial.tokens) == (64, 640)
    assert outline.trial.loss.flops == 2 * 640 * 629 * 64  # the output product, width 64
