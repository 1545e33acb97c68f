"""NextItemRecommender: its loss, its ranks, its baselines, and a run through Lightning."""

import dataclasses
import json
import math
import pickle

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from quiet_trainer import quiet_trainer
from refusals import refused
from taught import kl, saved, taught
from torch.testing import assert_close
from torch.utils.data import DataLoader

import core
from apps.cli.write.predictions import PredictionFile, columns_of
from apps.compare.systems import find_systems
from apps.recsys.sequence.comparison import baseline_widths
from apps.recsys.sequence.data import HistoryBatch
from apps.recsys.sequence.model import HistoryModelConfig
from apps.recsys.sequence.module import NextItemRecommender
from apps.train.optim.optimizers import OptimizerConfig, parameter_groups
from apps.train.step.distilling import DistilConfig

TINY = HistoryModelConfig(dim=8, depth=2, num_heads=2, hidden_dim=16, dropout=0.0, embed_dropout=0.0)
SASREC = HistoryModelConfig(dim=8, depth=2, num_heads=2, hidden_dim=16, mixing="attention")
HSTU = HistoryModelConfig(dim=8, depth=2, num_heads=2, mixing="hstu")
MOE = core.MoEConfig(num_experts=4, router=core.TokenChoice(top_k=2), expert=core.FFN(hidden_dim=32))


def build(moe=MOE, **kwargs):
    torch.manual_seed(0)
    return NextItemRecommender(**{"num_items": 9, "max_length": 6, "sequence": TINY, "moe": moe, **kwargs})


def batch(items, targets, seen=None, seconds=None):
    items, targets, n = torch.tensor(items), torch.tensor(targets), torch.arange(len(items))
    seen, seconds = (None if values is None else torch.tensor(values) for values in (seen, seconds))
    return HistoryBatch(items, targets, n, n + 100, seen, seconds)


TRAIN = batch([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0], [7, 0, 0, 0, 0]], [[1, 4, 1, 5, 9], [2, 6, 5, 0, 0], [0, 0, 0, 0, 0]])
LEFT = batch([[0, 3, 1, 4, 1, 5], [0, 0, 0, 9, 2, 6]], [[0, 1, 4, 1, 5, 9], [0, 0, 0, 2, 6, 5]])
EVAL = batch([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0], [7, 0, 0, 0, 0]], [[0, 0, 0, 0, 9], [0, 0, 5, 0, 0], [0, 0, 0, 0, 0]])


def test_the_loss_is_the_mean_over_targets_of_all_items_or_of_those_that_the_history_has_not():
    module = build()
    with torch.no_grad():
        out = module.train().task_loss(TRAIN)
        h_TD, _, _ = module.model.encode(TRAIN.items_BS)
        logits_TV = h_TD @ module.model.item_embed.weight[1:].t()  # no column for padding
        # 9 real items, of which the last has no target; item 1 is column 0.
        expected = F.cross_entropy(logits_TV[:8], torch.tensor([1, 4, 1, 5, 9, 2, 6, 5]) - 1)
    assert_close(out.loss, expected)
    assert out.num_examples == 3
    assert_close(module.task_loss(LEFT).loss.detach(), expected)  # wherever padding stands
    module = build(mask_seen_items=True, exclude_seen=True)
    with torch.no_grad():
        out = module.train().task_loss(TRAIN)
        h_TD, _, _ = module.model.encode(TRAIN.items_BS)
        logits_TV = h_TD[:8] @ module.model.item_embed.weight[1:].t()
        seen = [{3}, {3, 1}, {3, 1, 4}, {3, 1, 4}, {3, 1, 4, 5}, {9}, {9, 2}, {9, 2, 6}]
        targets = [1, 4, 1, 5, 9, 2, 6, 5]  # the third is an item that the history has before: a candidate all the same
        for row, own, target in zip(logits_TV, seen, targets, strict=True):
            row[[item - 1 for item in own - {target}]] = -math.inf
        expected = F.cross_entropy(logits_TV, torch.tensor(targets) - 1)
    assert_close(out.loss, expected)
    assert_close(module.task_loss(LEFT).loss.detach(), expected)  # wherever padding stands
    refused(r"mask_seen_items=True leaves logits of seen items untrained", lambda: module.distribution(TRAIN))


def test_times_reach_the_model_and_bfloat16_changes_little():
    module = build(sequence=dataclasses.replace(HSTU, time_buckets=32)).eval()
    with torch.no_grad():
        module.model.pair_bias.time_bias.normal_()
        near, far = (
            module.task_loss(batch([[3, 1, 4]], [[0, 0, 9]], seconds=[at])).outputs for at in ([1, 2, 3], [1, 2, 9999])
        )
    assert not torch.equal(near, far)
    refused(r"sequence.time_buckets=32 needs the times of the items.*data.time_column", lambda: module.task_loss(EVAL))
    module = build()
    with torch.no_grad():
        plain = module.task_loss(TRAIN).loss
        with torch.autocast("cpu", torch.bfloat16):
            out = module.eval().task_loss(EVAL)
            assert_close(module.train().task_loss(TRAIN).loss, plain, rtol=0.01, atol=0)
    assert out.outputs.dtype == torch.float32


@torch.no_grad()
def test_the_values_by_example_are_the_ndcg():
    module = build().eval()
    outs = [module.task_loss(EVAL)]
    metric = module.build_metrics()
    metric.update(outs[0].outputs, outs[0].targets)
    values = module.comparison.example_values(outs)
    assert values.values_N.shape == (2,)  # the third history has no next item
    assert values.mean == pytest.approx(float(metric.compute()["ndcg_10"]), rel=1e-12)


def test_a_teacher_says_all_items_at_the_positions_with_a_target(tmp_path):
    teacher = build().eval()
    with torch.no_grad():
        teacher.model.item_embed.weight.mul_(20.0)  # it is sure of some items
    module = build(None, sequence=SASREC, distil=DistilConfig(saved(teacher, tmp_path / "t.ckpt")))
    with torch.no_grad():
        given, own = (m.model.encode(TRAIN.items_BS)[0] @ m.model.output_weight.t() for m in (teacher, module.eval()))
    assert_close(
        module.distribution(TRAIN).divergence(teacher.distribution(TRAIN), 2.0).detach(),
        kl(given[:8], own[:8], 2.0).float(),
        rtol=1e-5,
        atol=0,
    )
    _, out, *_ = taught(module).train().training_loss(TRAIN)
    assert float(out.terms["teacher_loss"]) > 0
    refused("its num_items is 9, and this run's is 7", lambda: taught(build(None, num_items=7, distil=module.distil)))


def test_without_targets_the_loss_is_0_and_untrained_that_of_a_guess():
    module = build()
    for items in ([[0, 0, 0]], [[1, 2, 0]]):
        module.zero_grad()
        with core.record(module) as tape:
            loss = module.train().task_loss(batch(items, [[0, 0, 0]])).loss
        (loss + core.aux_loss(tape)).backward()
        assert float(loss.detach()) == 0.0
        assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())
    module = build()
    module.train().task_loss(batch([[4]], [[2]])).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())
    # Embeddings start small: all 9 items are about as likely.
    assert float(build().task_loss(TRAIN).loss.detach()) == pytest.approx(math.log(9), abs=0.05)


def ranking(module, scores):
    """Make ``module`` score the items 1 to 9 so after any history."""
    model = module.model
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.bias.copy_(F.one_hot(torch.tensor(0), 8))
        model.item_embed.weight[1:, 0] = torch.tensor(scores)
    return module.eval()


SCORES = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]


def test_the_last_items_target_is_ranked_among_the_items_that_may_be_predicted():
    module = ranking(build(), SCORES)
    out = module.task_loss(EVAL)
    # Items in the order 1, 2, ..., 9: 9 ranks ninth, 5 fifth. The third history has no target and no rank.
    assert (out.targets.tolist(), out.num_examples) == ([9, 5], 3)
    metrics = module.build_metrics()
    metrics.update(out.outputs, out.targets)
    values = {k: float(v) for k, v in metrics.compute().items()}
    assert values == pytest.approx(
        {"hr_10": 1.0, "ndcg_10": (1 / math.log2(10) + 1 / math.log2(6)) / 2, "mrr": (1 / 9 + 1 / 5) / 2}
    )
    module = ranking(build(exclude_seen=True), SCORES)
    # History 3, 1, 4, 1, 5 leaves 2, 6, 7, 8, 9: 9 ranks fifth. Of 9, 2, 6 the target 5 has 1, 3, 4 before it: fourth.
    out = module.task_loss(EVAL)
    assert [int((s > s[t]).sum()) + 1 for s, t in zip(out.outputs, out.targets, strict=True)] == [5, 4]
    # All that was seen counts, also what the history is too short for; 0 is padding.
    seen = [[3, 1, 4, 5, 8], [9, 2, 6, 1, 3], [7, 0, 0, 0, 0]]
    out = module.task_loss(batch(EVAL.items_BS.tolist(), EVAL.targets_BS.tolist(), seen))
    assert [int((s > s[t]).sum()) + 1 for s, t in zip(out.outputs, out.targets, strict=True)] == [4, 2]
    module = ranking(build(top_k=3), SCORES)
    predicted = module.predict_step(EVAL, 0)
    assert predicted.item == [["1", "2", "3"]] * 3
    assert predicted.name is None
    assert (predicted.score[0], predicted.index.tolist()) == (pytest.approx([0.9, 0.8, 0.7]), [0, 1, 2])
    assert predicted.user.tolist() == [100, 101, 102]
    unseen = ranking(build(top_k=3, exclude_seen=True), SCORES).predict_step(EVAL, 0)
    assert unseen.item == [["2", "6", "7"], ["1", "3", "4"], ["1", "2", "3"]]
    assert [len(items) for items in ranking(build(top_k=99), SCORES).predict_step(EVAL, 0).item] == [9, 9, 9]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_a_file_of_predictions_has_no_items_that_were_seen(tmp_path, ending):
    module = ranking(build(top_k=3, exclude_seen=True), SCORES)
    seen = [[*range(1, 10)], [*range(1, 9)], [1, 3, 4, 5, 6, 8, 9]]  # of nine items all, all but 9, all but 2 and 7
    with PredictionFile(tmp_path / f"best.{ending}").open() as file:
        for n in range(3):
            one = batch(EVAL.items_BS[n : n + 1].tolist(), EVAL.targets_BS[n : n + 1].tolist(), seen[n : n + 1])
            file.add_columns(columns_of(module.predict_step(one, n)))
    if ending == "csv":
        lines = [line.split(",") for line in (tmp_path / "best.csv").read_text().splitlines()]
        assert lines[0] == ["index", "user", "user_name", "item_1", "score_1", "item_2", "score_2"]
        assert [(row[3], row[5]) for row in lines[1:]] == [("", ""), ("9", ""), ("2", "7")]
        return
    lines = (tmp_path / "best.jsonl").read_text().splitlines() if ending == "jsonl" else []
    rows = [json.loads(line) for line in lines] or pq.read_table(tmp_path / "best.parquet").to_pylist()
    assert [row["item"] for row in rows] == [[], ["9"], ["2", "7"]]
    assert [row["score"] for row in rows] == [[], pytest.approx([0.1]), pytest.approx([0.8, 0.3])]


def test_baseline_widths_by_hand_and_all_else_the_same():
    # D = 8, E = 4, K = 2, F = 32. FLOPs a token: gate 2*8*4 = 64, experts 2 * 4*8*32 = 2048; 2112 / 32 = 66.
    # Parameters: gate 32, experts 4 * 2*8*32 = 2048; 2*8*F + F + 8 = 2080 gives F = 121.9.
    attention = baseline_widths(SASREC, MOE, 2)
    assert attention == {"sasrec_equal_flops": (66, ""), "sasrec_equal_params": (122, "")}
    # The mixture: 2*3*64 of the convolution and 2*8*2 of the gate, 416 FLOPs in each block, 13 of F; 248 parameters:
    # (2080 + 248 - 8) / 17 = 136.5. With one replaced block of two it makes up for both.
    assert baseline_widths(TINY, MOE, 2) == {"sasrec_equal_flops": (79, ""), "sasrec_equal_params": (136, "")}
    assert baseline_widths(TINY, MOE, 1)["sasrec_equal_flops"] == (92, "")
    # HSTU's own FFNs are as SASRec's before; in SASRec they make up for u, 2*8*8 = 128 FLOPs, 4 of F, and with its norm
    # 88 parameters: (2080 + 88 - 8) / 17 = 127.1. With one FFN in two blocks there is no SASRec to stand beside it.
    own = {"hstu_equal_flops": (66, ""), "hstu_equal_params": (122, "")}
    assert baseline_widths(HSTU, MOE, 2) == {**own, "sasrec_equal_flops": (70, ""), "sasrec_equal_params": (127, "")}
    assert baseline_widths(HSTU, MOE, 1) == own
    # Without experts: 16 + 13; (280 + 248 - 8) / 17 = 30.6.
    assert baseline_widths(TINY, None, 2) == {"sasrec_equal_flops": (29, ""), "sasrec_equal_params": (31, "")}
    sparse = build(moe_blocks=[1], optimizer=OptimizerConfig(lr=0.02), top_k=5, exclude_seen=True)
    for name, width in (("sasrec_equal_flops", 92), ("sasrec_equal_params", 151)):
        baseline = sparse.comparison.baselines()[name]
        assert f"hidden dim {width} in moe_blocks, 16 elsewhere" in baseline.note
        dense = pickle.loads(pickle.dumps(baseline.build))()  # into another process
        assert not core.moe_layers(dense)
        assert (dense.comparison.baselines(), dense.sequence.mixing) == ({}, "attention")
        assert [b.ffn.w_in.out_features for b in dense.model.blocks] == [16, width]
        assert (dense.optimizer_config, dense.top_k, dense.exclude_seen) == (OptimizerConfig(lr=0.02), 5, True)
    # Those of HSTU.
    sparse = build(sequence=dataclasses.replace(HSTU, time_buckets=16), moe_blocks=[1])
    (hstu, _) = sparse.comparison.baselines().values()
    assert hstu.note == "pointwise attention and dense FFNs, hidden dim 66 in moe_blocks, none elsewhere"
    dense = pickle.loads(pickle.dumps(hstu.build))()
    assert (dense.comparison.moe_block_names, dense.comparison.baselines(), dense.sequence) == ((), {}, sparse.sequence)
    assert [None if b.ffn is None else b.ffn.w_in.out_features for b in dense.model.blocks] == [None, 66]
    everywhere = build(sequence=HSTU).comparison.baselines()
    sasrec = everywhere["sasrec_equal_flops"].build()
    assert sasrec.sequence.mixing == "attention"
    assert sasrec.model.pair_bias is not None  # the scores of both have biases by distance
    assert build(None, sequence=HSTU).comparison.baselines() == {}


SPARSE = {
    "mixture_and_experts": {},
    "mixture": {"moe": None},
    "hstu": {"sequence": HSTU},
    "hstu_with_experts_in_one_block": {"sequence": HSTU, "moe_blocks": [-1]},
}


@pytest.mark.parametrize("name, full", [(name, name == "hstu") for name in SPARSE])
def test_baselines_cost_what_they_say(name, full):
    sparse = build(**SPARSE[name])
    data = batch([[3, 1, 4, 1, 5, 9]] * 3, [[0] * 6] * 3) if full else TRAIN
    systems = {s.name: s for s in find_systems(sparse, data)}
    kinds = {"hstu": ["hstu", "sasrec"], "hstu_with_experts_in_one_block": ["hstu"]}.get(name, ["sasrec"])
    assert list(systems) == ["sparse", *(f"{kind}_equal_{what}" for kind in kinds for what in ("flops", "params"))]
    assert not any(s.refused for s in systems.values())
    for kind in kinds:
        assert systems[f"{kind}_equal_flops"].replaced_ratio == pytest.approx(1, abs=0.03)
        assert systems[f"{kind}_equal_flops"].flops_ratio == pytest.approx(1, abs=0.03)
        assert systems[f"{kind}_equal_params"].params_ratio == pytest.approx(1, abs=0.03)


@pytest.mark.slow
def test_other_routers_at_equal_flops():
    sparse = build()
    systems = {s.name: s for s in find_systems(sparse, TRAIN, [], ["switch", "hash", "expert_choice", "task"])}
    for name in ("router_switch", "router_hash"):
        assert (systems[name].refused, systems[name].replaced_ratio) == ("", pytest.approx(1, abs=0.03))
    assert "lets later tokens change earlier ones" in systems["router_expert_choice"].refused
    assert "needs context.task_ids_B" in systems["router_task"].refused


def side_by_side(rows):
    return batch([items for items, _ in rows], [targets for _, targets in rows])


class Cycles(LightningDataModule):
    """Items 1 to 9 in a circle, from anywhere: the next one is certain."""

    num_items, max_length = 9, 6
    item_names = ("", *"abcdefghi")

    def _rows(self, last):
        rows = []
        for n, length in ((n, length) for n in range(9) for length in (2, 4, 6)):
            items = [(n + k) % 9 + 1 for k in range(length)] + [0] * (6 - length)
            targets = [(n + k + 1) % 9 + 1 if k == length - 1 or (not last and k < length) else 0 for k in range(6)]
            rows.append((items, targets))
        return rows

    def _loader(self, last, size, shuffle=False):
        return DataLoader(self._rows(last), batch_size=size, shuffle=shuffle, collate_fn=side_by_side)

    def train_dataloader(self):
        return self._loader(False, 9, shuffle=True)

    def val_dataloader(self):
        return self._loader(True, 10)

    test_dataloader = predict_dataloader = val_dataloader


@pytest.mark.filterwarnings("ignore")
def test_it_learns_what_can_be_learned_survives_a_checkpoint_and_refuses_data_of_another_size(tmp_path):
    torch.manual_seed(0)
    module = build(optimizer=OptimizerConfig(lr=0.04, weight_decay=0.0), ema_decay=0.5)
    run = quiet_trainer(tmp_path, max_epochs=14, log_every_n_steps=1)
    run.fit(module, datamodule=Cycles())
    (metrics,) = run.test(module, datamodule=Cycles(), verbose=False)
    assert metrics["test/ndcg_10"] > 0.99
    assert metrics["test/hr_10"] == 1.0
    assert metrics["test/mrr"] > 0.99
    assert module.monitor == "val/ndcg_10"
    assert run.callback_metrics["test/routing/model.blocks.0.mixing/entropy"] > 0
    assert "test/routing/model.blocks.1.ffn/load_imbalance" in run.callback_metrics
    first = run.predict(module, datamodule=Cycles())[0]
    assert first.item[0][0] == "3"  # after 1, 2; the data have names alone
    assert first.name[0][0] == "c"
    path = tmp_path / "it.ckpt"
    run.save_checkpoint(path)
    again = NextItemRecommender.load_from_checkpoint(path).eval()
    assert (again.sequence, again.moe) == (TINY, MOE)
    with torch.no_grad():
        assert torch.equal(again(EVAL.items_BS), module.eval()(EVAL.items_BS))
    with pytest.raises(ValueError, match=r"model.num_items=8 does not fit the data, whose num_items is 9"):
        quiet_trainer(tmp_path, max_epochs=1).fit(build(num_items=8), datamodule=Cycles())


def test_gates_have_rates_of_their_own_and_options_are_checked():
    config = OptimizerConfig(lr=1.0, weight_decay=0.5, router_lr_scale=0.25, expert_lr_scale=0.5)
    module = build()
    by_group = {g["name"]: g for g in parameter_groups(module, config)}
    gate = module.model.blocks[0].mixing.router.gate.weight
    conv = module.model.blocks[0].mixing.experts["convolution"].proj.weight
    assert any(p is gate for p in by_group["router"]["params"])
    assert any(p is conv for p in by_group["experts"]["params"])
    assert by_group["router"]["lr"] == 0.25
    refused(r"top_k=0 must be at least 1", lambda: build(top_k=0))
    refused(r"num_items=0 must be at least 1", lambda: build(num_items=0))
    refused(r"mask_seen_items=True needs exclude_seen=True", lambda: build(mask_seen_items=True))
    refused(r"target id 10 is not in 0 to num_items=9", lambda: build().task_loss(batch([[1, 2]], [[2, 10]])))
    refused(r"target id -100 is not in 0 to num_items=9", lambda: build().task_loss(batch([[1, 2]], [[2, -100]])))
