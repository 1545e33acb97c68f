"""A plan counts the FLOPs of a model that a comparison counts on a real batch of the same size."""

from __future__ import annotations

import pytest
import torch
from commands import fails
from made_pairs import made_pairs, retriever
from made_table import ragged

import core
from apps.plan.options import PlanOptions
from apps.plan.outline import measured, outlined, trial
from apps.recsys.encoding.features import (
    CategoricalFeature,
    ContinuousFeature,
    Features,
    SequenceFeature,
    VectorFeature,
)
from apps.recsys.tables.columns.bottoms import SingleTask
from apps.recsys.tables.columns.embedding import EmbeddingConfig
from apps.recsys.tables.columns.history import HistoryConfig
from apps.recsys.tables.module import MultiTaskRecommender
from apps.recsys.tables.rows.batch import TableBatch
from apps.train.cost.flops import measure_cost

RETRIEVER = ("--config", "configs/recsys/movielens_1m_retrieval.yaml", "--gpu", "h100", "--gpus", "8")
HISTORIES = ("--config", "configs/recsys/movielens_1m_din.yaml", "--gpu", "h100", "--gpus", "8")
TOWERS = ("--tables", "50", "3", "--item_tables", "200", "19", "--item_numbers", "1", "--model.num_items", "200")


# ---- two towers


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    data = made_pairs(tmp_path_factory.mktemp("pairs"))
    data.setup("fit")
    return data


def test_two_towers_cost_what_a_comparison_counts(pairs):
    batch = pairs.examples("train").__getitems__([1, 2, 3, 5])
    assert len(batch.item) == 4  # Brazil, Alien, Dune and Casablanca
    counted = measure_cost(retriever(pairs), batch, as_evaluated=True)
    with torch.device("meta"):
        module = retriever(pairs)
    outline = measured(module, PlanOptions.read([*RETRIEVER, "--batch", "4"]))
    assert outline.num_params == counted.num_params
    assert outline.trial.loss.flops == 2 * 4 * 4 * 4  # products of 4 users and 4 films, each with 4 numbers
    assert outline.flops - outline.trial.loss.flops == 4 * counted.flops_per_example
    assert [layer.rows for layer in outline.layers.values()] == [8, 8]  # two of four experts for each row


def test_the_softmax_over_a_batch_keeps_what_the_plan_counts(pairs):
    batch = pairs.examples("train").__getitems__([1, 2, 3, 5])
    module = retriever(pairs).train()
    module.forward = lambda user, item: (torch.ones(4, 4, requires_grad=True), torch.ones(4, 4, requires_grad=True))
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = module.task_loss(batch)
    assert out.loss.requires_grad
    # Beside them are the numbers of the pairs' items, 8 bytes each, and two numbers, of 4 bytes each.
    loss = trial(module, PlanOptions.read([*RETRIEVER, "--batch", "4"]), torch.float32).loss
    assert loss.kept == 4 * (4 * 4 + 2 * 4 * 4)
    assert sum(kept.values()) == loss.kept + 4 * 8 + 2 * 4


def test_further_negatives_are_more_rows_of_the_items_tower():
    given = PlanOptions.read([*RETRIEVER, *TOWERS, "--batch", "64", "--data.num_uniform", "36"])
    outline = outlined(given)
    assert outline.trial.loss.flops == 2 * 64 * 100 * 64
    assert [layer.rows for layer in outline.layers.values()] == [2 * 64, 2 * 100]
    # 201 vectors, of which one stands for no item, have 64 numbers each.
    assert outline.trial.remark == "exact search among 200 items: 5.15e-05 GB, 2.57e+04 FLOPs a user"


# ---- histories


def features():
    return Features(
        categorical=(CategoricalFeature("item", 9), CategoricalFeature("user", 5)),
        continuous=(ContinuousFeature("age"),),
        tasks=("click", "buy"),
        positives=(0.5, 0.5),
        vectors=(VectorFeature("title", 6),),
        sequences=(SequenceFeature("last", 9, 3, "item"), SequenceFeature("words", 7, 2)),
    )


def full_batch(size):
    """Return rows whose histories are full."""
    one = [[i % 9 for i in range(size)], [i % 5 for i in range(size)]]
    more = ([[1 + i % 8] * 3 for i in range(size)], [[1, 2]] * size)
    numbers = {"dense_BC": torch.ones(size, 1), "vector_BV": torch.ones(size, 6), "label_Bt": torch.ones(size, 2)}
    return TableBatch(**numbers, single_FB=torch.tensor(one), index_B=torch.arange(size), lists=ragged(*more))


MMOE = core.MMoE(num_experts=4, expert=core.MLP((8,)))


@pytest.mark.parametrize(
    "shared, history",
    [
        (MMOE, HistoryConfig("din", (5, 4))),
        (MMOE, HistoryConfig("din", (5,), "dice", normalize=True)),
        (MMOE, HistoryConfig()),
        (SingleTask(expert=core.MLP((8,))), HistoryConfig("din", (5,))),
    ],
)
def test_histories_cost_what_a_comparison_counts(shared, history):
    def model():
        return MultiTaskRecommender(features(), shared, embedding=EmbeddingConfig(dim=4), history=history)

    counted = measure_cost(model(), full_batch(6), as_evaluated=True)
    with torch.device("meta"):
        module = model()
    outline = measured(module, PlanOptions.read([*HISTORIES, "--batch", "6"]))
    assert outline.num_params == counted.num_params
    assert outline.flops == 6 * counted.flops_per_example


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_longer_histories_cost_their_attention(precision):
    tables = ("--tables", "100", "40", "--tasks", "2", "--batch", "8", "--precision", precision)
    outlines = [outlined(PlanOptions.read([*HISTORIES, *tables, "--histories", n])) for n in ("10", "30")]
    # Weights of 4 x 16 to 36 and of 36 to 1 numbers, two FLOPs each, for 20 items more of 8 rows.
    assert outlines[1].flops - outlines[0].flops == 2 * (64 * 36 + 36) * 20 * 8
    assert outlines[1].root.kept > outlines[0].root.kept


# ---- what is refused


DIN = (*HISTORIES, "--tables", "50")


@pytest.mark.parametrize(
    "code, argv, line",
    [
        (2, (*RETRIEVER, *TOWERS[:-2]), "the number of items comes from the data: give --model.num_items N"),
        (2, (*RETRIEVER, *TOWERS[3:]), "the columns of the users' tower come from the data: give --tables ROWS ..."),
        (2, (*RETRIEVER, *TOWERS[:3], *TOWERS[-2:]),
         "the columns of the items' tower come from the data: give --item"),
        (2, DIN, "history.pooling='din' reads come from the data: give --histories ITEMS ..."),
        (2, (*DIN, "--histories", "5", "--model.embedding.kind", "collection"),
         "histories are planned with embedding.kind='joined', not 'collection'"),
        (2, (*DIN, "--histories", "5", "--item_tables", "7"),
         "--item_tables describes columns of TwoTowerRetriever, not of MultiTaskRecommender"),
        (2, ("--config", "configs/vision/digits.yaml", *RETRIEVER[2:], "--histories", "5", "--tables", "9"),
         "--tables describes columns of MultiTaskRecommender and TwoTowerRetriever, not of VisionClassifier"),
        (1, (*DIN, "--histories", "5", "0"), "histories=0 must be at least 1"),
        (1, (*DIN, "--histories", "5", "6"), "histories=[5, 6] has the ids of as many tables"),
        (1, (*RETRIEVER, *TOWERS, "--item_numbers", "-1"), "item_numbers=-1 must not be negative"),
        (1, (*RETRIEVER, *TOWERS[:-1], "90"), "the last must be below the 90 items"),
    ],
)  # fmt: skip
def test_wrong_columns_and_values_are_one_line(code, argv, line, capsys):
    assert line in fails(capsys, code, "plan", *argv)


# ---- shared experts


def test_layers_that_share_experts_have_rows_and_activations_of_their_own():
    digits = ("--config", "configs/vision/digits_vmoe.yaml", "--gpu", "h100", "--gpus", "8", "--batch", "64")
    own, shared = (outlined(PlanOptions.read([*digits, "--model.share_experts", on])) for on in ("false", "true"))
    facts = [[(x.rows, x.dim, x.out_dim, x.kept) for x in outline.layers.values()] for outline in (own, shared)]
    assert facts[0] == facts[1]
    # Two experts for each of 16 patches of 64 images.
    assert [rows for rows, *_ in facts[1]] == [2 * 16 * 64] * 2
    assert shared.num_params < own.num_params
