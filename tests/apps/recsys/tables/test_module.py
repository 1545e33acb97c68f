"""MultiTaskRecommender: its loss, its baselines, and runs through Lightning and the command line."""

import dataclasses
import math
import pickle

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.plugins import MixedPrecision
from made_table import MadeTable, batch, features
from quiet_trainer import quiet_trainer
from refusals import refused
from taught import divergence, saved, taught
from torch.testing import assert_close
from torch.utils.data import DataLoader

import core
from apps.compare.systems import check_equal, measure_cost
from apps.recsys.encoding.features import Features, Target
from apps.recsys.kinds import Outputs
from apps.recsys.tables.columns.bottoms import SharedBottom, SingleTask
from apps.recsys.tables.columns.dense import DenseConfig
from apps.recsys.tables.columns.embedding import EmbeddingConfig
from apps.recsys.tables.comparison import BOTTOMS, ESTIMATORS, bottom, bottom_widths
from apps.recsys.tables.model import InteractionConfig
from apps.recsys.tables.module import MultiTaskRecommender, last_weight
from apps.recsys.tables.negatives.weighting import WeightingConfig
from apps.recsys.tables.outputs import TaskOutputs, labeled_mean
from apps.recsys.tables.tasks import HeadConfig
from apps.train.optim.optimizers import OptimizerConfig, parameter_groups
from apps.train.step.distilling import DistilConfig

NAN = math.nan
TWO_CLICKS = Outputs((Target(), Target()))
DOT = InteractionConfig("dot")
MMOE = core.MMoE(4, core.MLP((8,)))


def build(shared=MMOE, seed=0, **options):
    torch.manual_seed(seed)
    arguments = {"features": features(), "shared": shared, "embedding": EmbeddingConfig(dim=4), "report": None}
    return MultiTaskRecommender(**{**arguments, **options})


def rows(label_Bt):
    of = batch(len(label_Bt))
    return dataclasses.replace(of, label_Bt=torch.tensor(label_Bt), group_B=None)


@torch.no_grad()
def test_the_values_by_example_are_the_mean_auc_and_metrics_of_counts_are_an_option():
    module = build().eval()
    outs = [module.task_loss(batch(24)), module.task_loss(batch(16, seed=1))]
    metric = module.build_metrics()
    for out in outs:
        metric.update(out.outputs, out.targets, out.groups)
    values = module.comparison.example_values(outs)
    assert (values.values_N.shape, values.name) == ((40,), "mean auc")
    assert values.mean == pytest.approx(float(metric.compute()["auc"]), rel=1e-6)
    module, exact = build(score_bins=4096), build()
    refused("score_bins=1 must be at least 2", lambda: build(score_bins=1))
    of = batch(64)
    computed = []
    for each in (module, exact):
        metrics = each.build_metrics()
        out = each.eval().task_loss(of)
        metrics.update(out.outputs, out.targets, out.groups)
        computed.append(metrics.compute())
    assert not hasattr(module.build_metrics(), "scores")  # no prediction is kept
    assert_close(computed[0]["log_loss_click"], computed[1]["log_loss_click"])
    assert set(computed[1]) - set(computed[0]) == {"gauc", "gauc_click", "gauc_buy"}


def losses(z, label_Bt):
    return labeled_mean(TWO_CLICKS.losses(z, label_Bt), label_Bt)


def test_missing_labels_are_in_no_loss():
    # Click: logits 0 and log 3 (p = 1/2 and 3/4), labels 1 and none: log 2. Buy: labels 0, 1 at p = 1/2: log 2 each.
    z_Bt = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]], requires_grad=True)
    loss_t = losses(z_Bt, torch.tensor([[1.0, 0.0], [NAN, 1.0]]))
    assert_close(loss_t, torch.full((2,), math.log(2)))
    loss_t.sum().backward()
    # (p - y) over the labeled: click -1/2 of one, nothing of the other; buy 1/4 and -1/4.
    assert_close(z_Bt.grad, torch.tensor([[-0.5, 0.25], [0.0, -0.25]]))
    # A task without a label costs nothing.
    z_Bt = torch.zeros(2, 2, requires_grad=True)
    loss_t = losses(z_Bt, torch.tensor([[NAN, 1.0], [NAN, 1.0]]))
    assert loss_t.tolist() == pytest.approx([0.0, math.log(2)])
    loss_t.sum().backward()
    assert z_Bt.grad.isfinite().all()
    # Members are weighed alike.
    z_MBt = torch.randn(3, 4, 2)
    label_Bt = torch.tensor([[1.0, 0.0], [NAN, 1.0], [0.0, NAN], [1.0, 1.0]])
    assert_close(losses(z_MBt, label_Bt), torch.stack([losses(z, label_Bt) for z in z_MBt]).mean(0))


def test_a_teacher_counts_where_a_task_has_a_label_for_each_member_of_an_ensemble(tmp_path):
    # Click: the teacher says 3/4, the student 1/2, for the first example; the second has no label. Buy: 1/2 and 1/2.
    label_Bt = torch.tensor([[1.0, 0.0], [NAN, 1.0]])
    z_Bt = torch.zeros(2, 2, requires_grad=True)
    teacher = TaskOutputs(TWO_CLICKS, torch.tensor([[math.log(3), 0.0], [9.0, 0.0]]), label_Bt)
    cost = TaskOutputs(TWO_CLICKS, z_Bt, label_Bt).divergence(teacher, 1.0)
    assert_close(cost.detach(), torch.tensor(0.75 * math.log(1.5) + 0.25 * math.log(0.5)))
    cost.backward()
    assert_close(z_Bt.grad, torch.tensor([[0.5 - 0.75, 0.0], [0.0, 0.0]]))
    # At T = 2 the odds are sqrt(3).
    p = math.sqrt(3) / (1 + math.sqrt(3))
    cost = TaskOutputs(TWO_CLICKS, z_Bt, label_Bt).divergence(teacher, 2.0)
    assert_close(cost.detach(), torch.tensor(p * math.log(2 * p) + (1 - p) * math.log(2 - 2 * p)))
    teacher, of = build(num_members=2).eval(), batch(6)
    module = build(SharedBottom(), 1, num_members=3, distil=DistilConfig(saved(teacher, tmp_path / "t.ckpt"), 0.5))
    with torch.no_grad():
        p_Bt, q_MBt = teacher.model(of).sigmoid().mean(0).double(), module.eval().model(of).sigmoid().double()
    both = p_Bt * (p_Bt / q_MBt).log() + (1 - p_Bt) * ((1 - p_Bt) / (1 - q_MBt)).log()
    soft = both.mean((0, 1)).sum().float()
    assert_close(divergence(module, teacher, of, 1.0).detach(), soft, rtol=1e-3, atol=1e-7)
    loss, out, aux, _ = taught(module).train().training_loss(of)
    mixed = (out.terms["label_loss"] + out.terms["teacher_loss"]) / 2
    assert_close(out.loss.detach(), mixed)
    with pytest.raises(ValueError, match=r"targets: its features\.num_domains is 0, and this run's is 2"):
        taught(build(features=features(num_domains=2), distil=module.distil))


@pytest.mark.parametrize("kind", ["esmm", "aitm"])
def test_steps_that_are_left_out_count_as_those_that_are_written(kind):
    written, left_out = rows([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]]), rows([[1.0, 1.0], [0.0, NAN], [1.0, 0.0]])
    for training in (True, False):
        module = build(head=HeadConfig(kind), dropout=0.0).train(training)
        with torch.no_grad():
            a, b = module.task_loss(written), module.task_loss(left_out)
        assert_close(a.loss, b.loss)
        assert torch.equal(a.targets, b.targets)


def test_balance_losses_weigh_as_much_in_an_ensemble_as_in_one_network(tmp_path):
    """Members that are one network: the loss of the step and its gradients are that network's."""
    moe = core.MMoE(4, core.MLP((8,)), router=core.TokenChoice(top_k=2), balance=core.Balance(load_balancing_loss=0.5))
    alone, together = build(moe), build(moe, num_members=3)
    for member in together.members:
        member.load_state_dict(alone.model.state_dict())
    seen = []
    for module in (alone, together):

        class Losses(Callback):
            def on_before_backward(self, trainer, pl_module, loss):
                seen.append(loss.detach())

        trainer(tmp_path, max_steps=1, callbacks=[Losses()]).fit(module, MadeTable(steps=1))
    assert_close(seen[0], seen[1])
    with core.record(alone) as tape:
        alone.task_loss(batch())
    assert float(core.aux_loss(tape)) > 0.1


def test_the_terms_are_the_tasks_losses_and_steps_out_of_order_are_found():
    module = build(weighting=WeightingConfig(weights={"buy": 0.5}))
    out = module.task_loss(batch())
    assert_close(out.loss, out.terms["loss_click"] + 0.5 * out.terms["loss_buy"])
    assert (out.num_examples, out.groups.tolist()) == (6, [0, 0, 1, 1, 2, 2])
    module = build(head=HeadConfig("aitm", calibrator_weight=2.0))
    out = module.task_loss(batch())
    p_Bt = out.outputs.sigmoid()
    hinge = 2 * (p_Bt[:, 1] - p_Bt[:, 0]).relu().mean()
    assert_close(out.terms["calibrator"], hinge)
    assert_close(out.loss, out.terms["loss_click"] + out.terms["loss_buy"] + hinge)
    module = build(head=HeadConfig("esmm")).eval()
    module.task_loss(rows([[1.0, 1.0], [0.0, 0.0]]))
    refused("an example has 'buy' and not 'click'", lambda: module.task_loss(rows([[1.0, 1.0], [0.0, 1.0]])))


@pytest.mark.parametrize("kind", ["uncertainty", "gradnorm"])
@pytest.mark.parametrize("shared", [MMOE, core.PLE(2, core.MLP((4,)), num_task_experts=1), SharedBottom()])
def test_learned_weights_train(kind, shared):
    module = build(shared, weighting=WeightingConfig(kind))
    out = module.task_loss(batch())
    assert {"weight_click", "weight_buy"} <= out.terms.keys()
    out.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in module.weighting.parameters())
    plain = build(shared)
    assert_close(module.eval().task_loss(batch()).loss, plain.eval().task_loss(batch()).loss)


def test_gradnorm_reads_the_gradients_of_the_shared_experts_last_layer():
    for config, name in (
        (core.MMoE(4, core.MLP((8, 6))), "w_1"),
        (core.MMoE(4, core.SwiGLU(8)), "w_out"),
        (core.CGC(2, core.MLP((4,)), num_task_experts=3), "w_0"),
    ):
        module = build(config, weighting=WeightingConfig("gradnorm"))
        terms, shared = module.task_loss(batch()).terms, module.model.shared
        weight, num_shared = last_weight(shared)
        assert weight is getattr(shared.experts, name)
        assert num_shared == config.num_experts
        for i, task in enumerate(("click", "buy")):
            loss = losses(module(batch()), batch().label_Bt)[i]
            expected = torch.autograd.grad(loss, weight)[0][:num_shared].norm()
            assert_close(terms[f"gradient_norm_{task}"], expected)
    ple = build(core.PLE(2, core.MLP((4,)), num_levels=3)).model.shared
    assert last_weight(ple)[0] is ple.experts[2].w_0


def test_an_ensemble_is_its_members():
    module = build(num_members=3)
    z_MBt = torch.stack([m(batch()) for m in module.members])
    assert_close(module(batch()).sigmoid(), z_MBt.sigmoid().mean(0))
    out = module.task_loss(batch())
    assert_close(out.loss, losses(z_MBt, batch().label_Bt).sum())
    assert_close(out.outputs, module(batch()))
    assert module.comparison.moe_block_names == tuple(f"model.members.{i}.shared" for i in range(3))


def test_members_that_share_weights_train_and_predict_as_their_mean(tmp_path):
    module = build(SharedBottom(), num_members=3, share_members=True)
    z_MBt, of = module.model(batch()), batch()
    assert z_MBt.shape[0] == 3
    assert_close(module(of).sigmoid(), z_MBt.sigmoid().mean(0))
    out = module.task_loss(of)
    assert_close(out.loss, losses(z_MBt, of.label_Bt).sum())
    again = type(module).load_from_checkpoint(saved(module, tmp_path / "members.ckpt"))
    assert torch.equal(again(of), module(of))


@pytest.mark.parametrize(
    ("options", "match"),
    [({"features": Features(features().categorical)}, r"features.tasks=\(\) names no task"),
     ({"features": Features(tasks=("click",))}, "features has no column"),
     ({"dropout": 1.0}, r"dropout=1.0 must lie in \[0, 1\)"), ({"num_members": 0}, "num_members=0 is not at least 1"),
     ({"embedding": EmbeddingConfig("collection", dims={"town": 4})}, "embedding.dims names 'town'"),
     ({"weighting": WeightingConfig(weights={"like": 1.0})}, "weighting.weights names 'like'"),
     ({"weighting": WeightingConfig("gradnorm"), "num_members": 2}, "num_members=2 has as many"),
     ({"weighting": WeightingConfig("gradnorm"), "shared": SingleTask()}, "SingleTask shares nothing"),
     ({"interaction": DOT, "embedding": EmbeddingConfig("collection", dims={"city": 4})}, "dot"),
     ({"shared": core.MMoE(4, core.MLP((8,)), num_domain_experts=1)}, "needs num_domains, which is 0")],
)  # fmt: skip
def test_bad_arguments_are_refused(options, match):
    refused(match, lambda: build(**options))


@pytest.mark.parametrize(
    "shared",
    [core.MMoE(8, core.MLP((16,))), core.MMoE(8, core.MLP((16, 8), norm="batch", activation="silu")),
     core.PLE(4, core.MLP((16,)), num_task_experts=2),
     core.MMoE(32, core.MLP((8,)), router=core.TokenChoice(top_k=4)), core.CGC(4, core.FFN(16), num_task_experts=2),
     core.HoME(4, core.MLP((16,)), categories=(0, 1)), core.M3oE(4, core.MLP((16,))),
     core.STAR(expert=core.MLP((64,))), core.SMES(8, core.MLP((16, 8)), 2, 0),
     core.RankMixer(num_tokens=4, token_dim=16)],
    ids=["mmoe", "deep", "ple", "sparse", "ffn", "home", "m3oe", "star", "smes", "rank mixer"],
)  # fmt: skip
def test_baselines_cost_what_the_shared_layer_does(shared):
    domains = 3 if isinstance(shared, core.M3oE | core.STAR) else 0
    module, rows = build(shared, features=features(num_domains=domains)), batch(64, num_domains=domains)
    own_cost = measure_cost(module, rows, module.comparison.moe_block_names)
    by_name = module.comparison.baselines()
    assert list(by_name)[:4] == [
        f"{kind}_equal_{what}" for kind in ("shared_bottom", "single_task") for what in ("flops", "params")
    ]
    for name in list(by_name)[:4]:
        if by_name[name].build is None:
            assert "coincides" in by_name[name].note
            continue
        twin = by_name[name].build()
        its = measure_cost(twin, rows, module.comparison.moe_block_names)
        assert check_equal(name, own_cost, its) == ""
        assert type(twin.shared_config) is (SingleTask if name.startswith("single") else SharedBottom)
        pickle.loads(pickle.dumps(by_name[name]))


def test_the_widths_of_bottoms_by_hand():
    # D = 10, 8 experts of 16, 2 tasks. Parameters: gates 2 * 8 * 10 = 160, experts 8 * (10 + 1) * 16 = 1,408: 1,568.
    # A bottom of width h has 11 h: 142.5, so 143. Two models of 71.3 each: 71.
    # FLOPs: 8 * 2 * 10 * 16 = 2,560 of experts, 2 * 16 * (10 + 16) = 832 of gates: 3,392 = 20 h: 169.6; two of 85.
    shared = core.MMoE(8, core.MLP((16,)))
    widths = {n: w.width for p in BOTTOMS for n, w in bottom_widths(p, shared, 10, features()).items()}
    assert widths == {
        "shared_bottom_equal_flops": 170, "shared_bottom_equal_params": 143, "single_task_equal_flops": 85,
        "single_task_equal_params": 71,
    }  # fmt: skip
    assert bottom(SingleTask, shared, 85) == SingleTask(expert=core.MLP((85,)))
    # D = 1, one expert of 1, 2 tasks: 2 parameters of gates and 2 of the expert; two models of width h have 4 h: equal.
    # FLOPs: 2 of the expert, 2 * 2 * (1 + 1) = 8 of the gates, 10 in all, against 4 h: 8 or 12.
    solved = bottom_widths("single_task", core.MMoE(1, core.MLP((1,))), 1, features())
    assert solved["single_task_equal_params"].width == 1
    assert solved["single_task_equal_flops"].problem == "no whole width comes within 5% of 10 flops"


def test_baselines_have_what_they_can_and_a_comparison_says_what_is_not_sparse():
    # Single-task models have nothing that joins tasks.
    module = build(head=HeadConfig("aitm"), weighting=WeightingConfig("uncertainty"), num_members=2)
    twin = module.comparison.baselines()["single_task_equal_flops"].build()
    assert (twin.head.kind, twin.weighting_config.kind, twin.num_members) == ("plain", "fixed", 2)
    assert module.comparison.baselines()["shared_bottom_equal_flops"].build().head.kind == "aitm"
    # Gates by domain and column are those of the bottom alone.
    head = HeadConfig(personal=("city",), domain_dim=4)
    module = build(features=features(num_domains=3), head=head, gate_embeddings=5)
    by_name = module.comparison.baselines()
    bottom_twin, single = (by_name[f"{kind}_equal_flops"].build() for kind in ("shared_bottom", "single_task"))
    assert (bottom_twin.head, bottom_twin.gate_embeddings) == (head, 5)
    assert (single.head, single.gate_embeddings) == (HeadConfig(), 0)
    by_name = build().comparison.baselines()
    for name, (kind, _) in ESTIMATORS.items():
        assert type(by_name[name].build()) is kind
    assert (build(SharedBottom()).comparison.baselines(), build(SharedBottom()).comparison.moe_block_names) == ({}, ())
    assert (
        build(core.MMoE(num_experts=2)).comparison.note == "MMoE with dense gates: every expert computes every example"
    )
    assert build(core.SMES(8)).comparison.note == ""
    assert build(core.MMoE(num_experts=2, router=core.TokenChoice(top_k=1))).comparison.note == ""
    star = build(core.STAR(), features=features(num_domains=2))
    assert (star.comparison.note, star.comparison.heading) == ("", "STAR")


def trainer(tmp_path, **options):
    return quiet_trainer(tmp_path, **{"max_epochs": 2, "num_sanity_val_steps": 0, "log_every_n_steps": 1, **options})


@pytest.mark.parametrize("kind", ["joined", "fused", "collection"])
def test_it_trains_tests_and_predicts(kind, tmp_path):
    seed_everything(0, verbose=False)
    module = build(
        embedding=EmbeddingConfig(kind, dim=4), optimizer=OptimizerConfig(lr=1e-2, warmup_steps=0), num_members=2
    )
    data, run = MadeTable(), trainer(tmp_path)
    before = module.members[0].sparse.tables()["city"].clone()
    run.fit(module, datamodule=data)
    assert (module.members[0].sparse.tables()["city"] != before).any()
    logged = run.validate(module, datamodule=data, verbose=False)[0]
    names = {"val/loss", "val/auc", "val/gauc"}
    names |= {f"val/{m}_{t}" for m in ("auc", "pr_auc", "log_loss", "ece", "gauc") for t in ("click", "buy")}
    assert names <= logged.keys()
    assert logged["val/auc"] == pytest.approx((logged["val/auc_click"] + logged["val/auc_buy"]) / 2)
    assert module.shown_metrics == ("auc_click", "auc_buy")
    predicted = run.predict(module, datamodule=data)[0]
    assert predicted.keys() == {"index", "probability_click", "probability_buy", "label_click", "label_buy"}
    assert_close(predicted["probability_buy"], module.eval()(batch(16, seed=200))[:, 1].sigmoid())


def test_the_loss_of_an_evaluation_is_the_sum_of_means_over_all_labels(tmp_path):
    module = build(head=HeadConfig("aitm", calibrator_weight=2.0), weighting=WeightingConfig(weights={"buy": 3.0}))
    batches = rows([[1.0, NAN]] * 4), rows([[1.0, NAN], [1.0, 1.0]])
    with torch.no_grad():
        first, last = (module.eval().task_loss(own).terms for own in batches)
    click, hinge = ((4 * first[name] + 2 * last[name]) / 6 for name in ("loss_click", "calibrator"))
    (logged,) = trainer(tmp_path).validate(module, DataLoader(batches, batch_size=None), verbose=False)
    assert logged["val/loss"] == pytest.approx(float(click + 3 * last["loss_buy"] + hinge), rel=1e-6)


class SaveInBetween(Callback):
    """Saves after the second epoch of four."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("kind", ["joined", "fused"])
def test_a_resumed_run_ends_in_the_same_weights(kind, tmp_path):
    def make():
        options = OptimizerConfig(lr=1e-2)
        return build(embedding=EmbeddingConfig(kind, dim=4), optimizer=options, ema_decay=0.9, dropout=0.0)

    path = tmp_path / "half.ckpt"
    whole, resumed = make(), make()
    trainer(tmp_path, max_epochs=4, callbacks=[SaveInBetween(path)]).fit(whole, datamodule=MadeTable())
    trainer(tmp_path, max_epochs=4).fit(resumed, datamodule=MadeTable(), ckpt_path=path, weights_only=True)
    assert_close(resumed.state_dict(), whole.state_dict(), atol=0, rtol=0)
    for a, b in zip(resumed.members, whole.members, strict=True):
        assert_close(a.sparse.fused_state(), b.sparse.fused_state(), atol=0, rtol=0)


def test_a_checkpoint_holds_everything(tmp_path):
    module = build(
        core.PLE(2, core.MLP((4,)), num_task_experts=1),
        dense=DenseConfig("quantile"),
        head=HeadConfig("aitm"),
        weighting=WeightingConfig("uncertainty", {"buy": 0.5}),
    )
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, datamodule=MadeTable())
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = MultiTaskRecommender.load_from_checkpoint(tmp_path / "a.ckpt")
    assert (again.features, again.shared_config) == (features(), module.shared_config)
    assert again.weighting_config == module.weighting_config
    assert_close(again.eval()(batch()), module.eval()(batch()))


def test_what_cannot_be_trained_is_refused(tmp_path):
    module = build(features=Features(*(getattr(features(), n) for n in ("categorical", "continuous")), ("click",)))
    with pytest.raises(ValueError, match=r"model.features does not fit the data: tasks is"):
        trainer(tmp_path).fit(module, datamodule=MadeTable())
    for options, match in (
        ({"accumulate_grad_batches": 2}, "trainer.accumulate_grad_batches=2 does not reach"),
        ({"gradient_clip_val": 1.0}, "trainer.gradient_clip_val=1.0 does not reach"),
        ({"plugins": MixedPrecision("16-mixed", "cpu")}, "trainer.precision='16-mixed' has scaled up: take 'bf16-mi"),
    ):
        module = build(embedding=EmbeddingConfig("fused", dim=4))
        with pytest.raises(ValueError, match=match):
            trainer(tmp_path, **options).fit(module, datamodule=MadeTable())


def test_a_twin_is_the_same_module_anew_whose_tables_do_not_decay():
    module = build(dropout=0.2, num_members=2, head=HeadConfig("esmm"), dense=DenseConfig("quantile"), ema_decay=0.9)
    twin = module.twin()
    assert {k: v.shape for k, v in twin.state_dict().items()} == {k: v.shape for k, v in module.state_dict().items()}
    assert {k: v for k, v in module.hparams.items() if v is not None}.items() <= twin.hparams.items()
    assert dict(twin.twin(head=HeadConfig()).hparams) != dict(twin.hparams) == dict(twin.twin().hparams)
    module = build()
    names = {id(p): n for n, p in module.named_parameters()}
    groups = {g["name"]: [names[id(p)] for p in g["params"]] for g in parameter_groups(module, OptimizerConfig())}
    assert "model.sparse.weight" in groups["rest_no_decay"]
    assert "model.head.weight" in groups["rest"]
    assert "model.shared.experts.w_0" in groups["experts"]
