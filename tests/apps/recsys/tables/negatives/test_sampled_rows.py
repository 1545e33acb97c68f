"""A part of the negatives trains in each epoch, while predictions are of all rows; and weights of the tasks' losses."""

import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from refusals import refused
from torch.testing import assert_close

from apps.recsys.encoding.features import Target
from apps.recsys.kinds import Outputs
from apps.recsys.schema import NegativesConfig, SplitConfig, TableConfig, TaskConfig
from apps.recsys.tables.data import TableData
from apps.recsys.tables.module import MultiTaskRecommender
from apps.recsys.tables.negatives.sampled_rows import SampledPlan
from apps.recsys.tables.negatives.weighting import WeightingConfig

THREE = NegativesConfig(3, "click")


def data_of(tmp_path, negatives=THREE, **options):
    """10 clicks, of which 5 are liked, 90 others, of which none is, and 4 rows without a click's label."""
    rows = {
        "city": ["Rome", "Oslo"] * 52, "click": [1] * 10 + [0] * 90 + [None] * 4, "like": [1] * 5 + [0] * 95 + [1] * 4,
        "price": [2.5] * 50 + [1.0] * 54,
    }  # fmt: skip
    pq.write_table(pa.table(rows), tmp_path / "table.parquet")
    tasks = {"click": TaskConfig("click"), "like": TaskConfig("like"), "price": TaskConfig("price", kind="regression")}
    config = TableConfig(("city",), tasks=tasks, split=SplitConfig(val=0, test=0))
    options = {"table": config, "batch_size": 16, "seed": 0, "negatives": negatives, **options}
    return TableData("table", str(tmp_path), str(tmp_path / "cache"), train_file="table.parquet", **options)


def epoch_of(loader, epoch=0):
    loader.batch_sampler.sampler.set_epoch(epoch)
    return list(loader)


def test_an_epoch_has_so_many_negatives_and_goes_on_with_the_same_rows(tmp_path):
    loader = data_of(tmp_path).train_dataloader()
    batches = epoch_of(loader)
    assert [len(batch) for batch in batches] == [16, 16, 12]  # 10 and 4 and 3 * 10
    first = torch.cat([batch.index_B for batch in batches])
    assert first.unique().numel() == 44
    assert {*range(10), *range(100, 104)} <= set(first.tolist())
    assert len(loader) == 3
    again = torch.cat([batch.index_B for batch in epoch_of(data_of(tmp_path).train_dataloader())])
    assert torch.equal(again, first)
    other = torch.cat([batch.index_B for batch in epoch_of(loader, 1)])
    assert set(other.tolist()) != set(first.tolist())
    # In 40 epochs each of 90 negatives is drawn 13 times on average, and about never less than 3 times.
    drawn = torch.cat([batch.index_B for epoch in range(40) for batch in epoch_of(loader, epoch)])
    assert drawn.bincount(minlength=104)[10:100].min() > 2
    dropped = data_of(tmp_path, drop_last=True).train_dataloader()
    assert [len(batch) for batch in epoch_of(dropped)] == [16, 16]
    # A resumed epoch goes on with the same rows.
    loader = data_of(tmp_path).train_dataloader()
    whole = [batch.index_B.tolist() for batch in epoch_of(loader, 2)]
    resumed = data_of(tmp_path).train_dataloader()
    resumed.load_state_dict({"epoch": 2, "served": 1, "seed": 0})
    assert [batch.index_B.tolist() for batch in epoch_of(resumed, 2)] == whole[1:]


def test_processes_share_an_epoch_out_evenly(tmp_path):
    # 44 rows on 3 processes: 15 each, and one row is repeated; batches of 8 and 7.
    rows = data_of(tmp_path).examples("train")
    plan = SampledPlan(rows, 8, drop_last=False, num_processes=3)
    batches = plan.batches(0, 0)
    assert len(plan) == 6
    assert [len(batch) for batch in batches] == [8, 8, 8, 7, 7, 7]
    alone = torch.cat(list(SampledPlan(rows, 8, drop_last=False).batches(0, 0)))
    assert torch.equal(torch.cat(list(batches)).unique(), alone.sort().values)
    assert [len(b) for b in SampledPlan(rows, 8, True, 3).batches(0, 0)] == [8, 8, 8]
    with pytest.raises(ValueError, match="batch_size=16 exceeds the 44 rows of an epoch; drop_last drops them all"):
        SampledPlan(rows, 16, True, 3)


def test_the_logit_that_fits_an_epoch_is_that_of_all_rows_and_other_tasks_weigh_what_is_left(tmp_path):
    # 10 of 100 are clicks. With a third of the negatives 10 of 40 are, and -log(1/3) is the difference of the logits.
    outputs = Outputs((Target(),) * 2)
    for correct, rate in ((True, 0.1), (False, 0.25)):
        batches = epoch_of(data_of(tmp_path, NegativesConfig(3, "click", correct)).train_dataloader())
        label_B = torch.cat([batch.label_Bt[:, 0] for batch in batches])
        offset_Bt = batches[0].offset_Bt
        z = torch.tensor([math.log(rate / (1 - rate)), 0.0]).expand(len(label_B), 2).clone().requires_grad_()
        shifted = z if offset_Bt is None else outputs.shifted(z, offset_Bt[:1, :2])
        known_B = ~label_B.isnan()
        F.binary_cross_entropy_with_logits(shifted[known_B, 0], label_B[known_B], reduction="sum").backward()
        assert_close(z.grad.sum(), torch.tensor(0.0), rtol=0, atol=1e-5)
    assert_close(math.log(0.25 / 0.75) - math.log(0.1 / 0.9), math.log(3))
    batches = epoch_of(data_of(tmp_path).train_dataloader())
    label_B, like_B = (torch.cat([batch.label_Bt[:, t] for batch in batches]) for t in (0, 1))
    weight_Bt = torch.cat([batch.weight_Bt for batch in batches])
    assert weight_Bt[:, 0].unique().tolist() == [1.0]
    # Each of 30 kept negatives stands for 3: 14 + 3 * 30 are the 104 rows, and the mean weight is 1.
    of_others = weight_Bt[label_B != 0, 1].unique()
    assert_close(weight_Bt[label_B == 0, 1], (3 * of_others).expand(30))
    assert_close(weight_Bt[:, 1:].mean(0), torch.ones(2))
    # 5 clicks and the 4 rows without a label are liked.
    assert_close((weight_Bt[:, 1] * like_B).sum() / weight_Bt[:, 1].sum(), torch.tensor(9 / 104))


def test_a_model_learns_the_rate_of_all_rows(tmp_path):
    data = data_of(tmp_path)
    model = MultiTaskRecommender(data.features)
    (batch, *_) = epoch_of(data.train_dataloader())
    z, label_B = model(batch), batch.label_Bt[:, 0]
    known_B = ~label_B.isnan()
    expected = F.binary_cross_entropy_with_logits(z[known_B, 0] + math.log(3), label_B[known_B])
    out = model.task_loss(batch)
    assert_close(out.terms["loss_click"], expected.detach())
    assert_close(out.outputs, z)  # what predicts is the logit itself
    # Evaluation reads all rows as they are.
    (evaluated,) = data.train_eval_dataloader()
    assert (len(evaluated), evaluated.offset_Bt, evaluated.weight_Bt) == (104, None, None)


def test_all_negatives_train_where_there_are_no_more(tmp_path, caplog):
    caplog.set_level("INFO")
    data = data_of(tmp_path, NegativesConfig(30, "click"))
    data.setup("fit")
    assert "negatives of task click: 90 of 90 train in an epoch, all that there are" in caplog.text
    batches = epoch_of(data.train_dataloader())
    assert (sum(map(len, batches)), batches[0].offset_Bt.unique().tolist()) == (104, [0])
    assert batches[0].weight_Bt.unique().tolist() == [1]


@pytest.mark.parametrize(
    ("options", "match"),
    [({}, "negatives.task=None: name one of the tasks click, like, price"),
     ({"task": "clicks"}, "negatives.task='clicks' is not one of click, like, price; did you mean 'click'"),
     ({"task": "price"}, "negatives.task='price' is of kind 'regression', which has no negative rows")],
)  # fmt: skip
def test_refused(tmp_path, options, match):
    refused(match, lambda: data_of(tmp_path, options).train_dataloader())


TASKS = ("click", "buy")


def losses(*values):
    return torch.tensor(values, requires_grad=True)


def test_uncertainty_weighs_by_the_variance_from_the_given_weights_on():
    # s = log 2 and 0: 2 / 2 + log(2) / 2 + 4 / 1 + 0.
    weighting = WeightingConfig("uncertainty").build(TASKS)
    with torch.no_grad():
        weighting.log_variance[0] = math.log(2)
    loss, learnt = weighting(losses(2.0, 4.0))
    assert float(loss) == pytest.approx(5 + math.log(2) / 2)
    assert learnt["weight"].tolist() == pytest.approx([0.5, 1.0])
    loss.backward()
    # d/ds (e^-s L + s / 2) = -e^-s L + 1/2: at rest where the variance is twice the loss.
    assert weighting.log_variance.grad.tolist() == pytest.approx([-0.5, -3.5])
    assert float(weighting.eval()(losses(2.0, 4.0))[0]) == 6.0  # the models stay comparable
    _, learnt = WeightingConfig("uncertainty", {"buy": 0.25}).build(TASKS)(losses(1.0, 1.0))
    assert learnt["weight"].tolist() == pytest.approx([1.0, 0.25])


def test_gradnorm_pulls_the_gradients_to_one_norm():
    # W = (1, 2). L1 = 3 w1, L2 = w2 + 4: gradients (3, 0) and (0, 1), norms 3 and 1; weights 1 and 1.
    # alpha 0: target (3 + 1) / 2 = 2; balance |3 - 2| + |1 - 2| = 2. w = 2 softmax(u): dw1/du1 = 2 * 1/4 = 1/2,
    # dw2/du1 = -1/2. d balance/du1 = 3 * 1/2 * (+1) + 1 * (-1/2) * (-1) = 2: descent lowers the first weight.
    weighting = WeightingConfig("gradnorm", alpha=0.0).build(TASKS)
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    loss, learnt = weighting(torch.stack((3 * w[0], w[1] + 4)), shared=(w, 2))
    assert float(loss) == pytest.approx(3 + 6)  # the balance adds nothing to the value
    assert learnt["gradient_norm"].tolist() == pytest.approx([3.0, 1.0])
    loss.backward()
    assert weighting.logits.grad.tolist() == pytest.approx([2.0, -2.0])
    assert w.grad.tolist() == [3.0, 1.0]  # the weighted losses alone move the rest


@pytest.mark.parametrize("kind", ["uncertainty", "gradnorm"])
def test_a_batch_without_labels_teaches_the_weights_nothing(kind):
    weighting = WeightingConfig(kind).build(TASKS)
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    loss, _ = weighting(0 * w, torch.tensor([False, False]), (w, 2))
    loss.backward()
    assert float(loss) == 0
    assert all(p.grad.tolist() == [0, 0] for p in weighting.parameters())


def test_gradnorm_helps_the_slower_task_and_leaves_one_without_labels_out():
    # Constant predictions lose log 2 each. L = log 2 (still there) and log(2) / 3: rates 1.5 and 0.5, norms 1 and 1.
    # alpha 1: targets 1.5 and 0.5: the first weight rises, the second falls.
    weighting = WeightingConfig("gradnorm", alpha=1.0).build(TASKS, (math.log(2), math.log(2)))
    w = torch.tensor([math.log(2), math.log(2) / 3], requires_grad=True)
    loss, _ = weighting(w * 1.0, shared=(w, 2))
    loss.backward()
    assert weighting.logits.grad[0] < 0 < weighting.logits.grad[1]
    # The task alone is at the mean rate, and its norm is the mean norm: nothing pulls at the weights.
    weighting = WeightingConfig("gradnorm", alpha=1.0).build(TASKS)
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    weighting(torch.stack((3 * w[0], 0 * w[1])), torch.tensor([True, False]), (w, 2))[0].backward()
    assert weighting.logits.grad.tolist() == [0, 0]


def test_weights_sum_to_the_number_of_tasks_and_fixed_ones_are_a_sum():
    weighting = WeightingConfig("gradnorm").build(("a", "b", "c"))
    with torch.no_grad():
        weighting.logits.copy_(torch.tensor([5.0, 0.0, -5.0]))
    w = torch.ones(3, requires_grad=True)
    _, learnt = weighting(w * 1.0, shared=(w, 3))
    assert (learnt["weight"] > 0).all()
    assert_close(learnt["weight"].sum(), torch.tensor(3.0))
    # 1 * 2 + 0.5 * 4.
    loss, learnt = WeightingConfig(weights={"buy": 0.5}).build(TASKS)(losses(2.0, 4.0))
    assert (float(loss), learnt) == (4.0, {})


@pytest.mark.parametrize("kind", ["uncertainty", "gradnorm"])
def test_learned_weights_do_not_enter_an_evaluation(kind):
    weighting = WeightingConfig(kind, weights={"click": 2.0}).build(TASKS).eval()
    with torch.no_grad():
        next(iter(weighting.parameters())).fill_(1.0)
    loss, learnt = weighting(losses(1.0, 1.0))
    assert (float(loss), learnt) == (3.0, {})
