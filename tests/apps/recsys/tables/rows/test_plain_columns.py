"""A table's columns in plain tensors are those of the model, whatever the embeddings."""

import dataclasses

import pytest
import torch
from made_table import AGE, FLAT, batch, features, ragged
from torch import Tensor

import core
from apps.recsys.encoding.features import Features, SequenceFeature, VectorFeature
from apps.recsys.tables.columns.bottoms import SharedBottom, SingleTask
from apps.recsys.tables.columns.dense import DenseConfig
from apps.recsys.tables.columns.embedding import EmbeddingConfig
from apps.recsys.tables.columns.history import HistoryConfig
from apps.recsys.tables.export import PlainTables
from apps.recsys.tables.module import MultiTaskRecommender
from apps.recsys.tables.rows.batch import TableBatch
from apps.recsys.tables.rows.plain_columns import dynamic_axes, example_inputs, plain_inputs
from apps.serve.export.programs import capture
from apps.train.publish.exporting import Graph

SHARED = SharedBottom(expert=core.MLP((4,)))


def whole_features() -> Features:
    """Every kind of column: a sequence of cities, one with a table of its own, and vectors of 3 numbers."""
    sequences = (SequenceFeature("past", 5, 4, "city"), SequenceFeature("own", 9, 4))
    return dataclasses.replace(features(), sequences=sequences, vectors=(VectorFeature("v", 3, 2.0),))


def whole_batch(size: int = 4) -> TableBatch:
    draw = torch.Generator().manual_seed(3)
    lists = ragged([[1, 4], [], [2], [3, 3, 1]], [[8], [1, 2], [], []])
    vector_BV = torch.randn(size, 3, generator=draw)
    vector_BV[2] = torch.nan
    of = batch(size)
    return dataclasses.replace(of, lists=(*of.lists, *lists), vector_BV=vector_BV)


def recommender(own: Features, shared: core.MultiGateConfig = SHARED, **options) -> MultiTaskRecommender:
    torch.manual_seed(0)
    model = MultiTaskRecommender(own, shared, report=None, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def both(model: MultiTaskRecommender, of: TableBatch) -> tuple[Tensor, Tensor]:
    """Return the outputs of the network in plain tensors, and of the model."""
    inputs = plain_inputs(of, model.features)
    network = PlainTables(model.members, model.outputs, model.features, tuple(inputs)).eval()
    with torch.no_grad():
        return network(*inputs.values()), model(of)


def test_inputs_and_examples_by_hand():
    lists = ragged([[6], [0, 5]], [[1, 4], []], [[], []])
    of = TableBatch(torch.tensor([[1.0, 3.0], [torch.nan, 3.0]]), torch.tensor([[2, 3]]), torch.zeros(2, 2),
                    torch.arange(2), vector_BV=torch.ones(2, 3), lists=lists)  # fmt: skip
    inputs = plain_inputs(of, whole_features())
    assert list(inputs) == ["dense", "categorical", "list_0", "list_1", "list_2", "vectors"]
    assert (inputs["categorical"].tolist(), inputs["list_0"].tolist()) == ([[2], [3]], [[6, -1], [0, 5]])
    assert inputs["list_1"].tolist() == [[1, 4], [-1, -1]]
    assert inputs["list_2"].tolist() == [[-1], [-1]]  # at least one place
    assert dynamic_axes(inputs)["list_1"] == {0: "batch", 1: "length_1"}
    assert dynamic_axes(inputs)["dense"] == {0: "batch"}
    inputs = example_inputs(dataclasses.replace(whole_features(), num_domains=3))
    assert list(inputs) == ["dense", "categorical", "list_0", "list_1", "list_2", "vectors", "domain"]
    assert inputs["dense"][0, 0].isnan()
    assert (inputs["list_0"][0] == -1).all()
    assert inputs["list_0"][2, :2].min() > 0
    assert inputs["domain"].max() < 3


NUMBERS = (
    DenseConfig(log1p=True), DenseConfig("quantile"), DenseConfig("piecewise_linear"),
    DenseConfig("piecewise_linear", dim=4),
)  # fmt: skip
BY_LABEL = dataclasses.replace(AGE, thresholds=(25.0, 40.0, 60.0), least=10.0, most=90.0)
ALONE = {"shared": SingleTask(expert=core.MLP((4,)))}


@pytest.mark.parametrize("kind", ["joined", "fused", "collection"])
def test_every_embedding_and_encoding_of_numbers_lists_and_vectors(kind):
    for dense in NUMBERS:
        model = recommender(features(), embedding=EmbeddingConfig(kind=kind, dim=4), dense=dense)
        torch.testing.assert_close(*both(model, batch()))
    for numbers in ("bins", "linear"):
        own = dataclasses.replace(features(), continuous=(BY_LABEL, FLAT), numbers=numbers)
        model = recommender(own, embedding=EmbeddingConfig(kind=kind, dim=4), dense=DenseConfig("by_label"))
        torch.testing.assert_close(*both(model, batch()))
    whole = [({}, pooling) for pooling in ("mean", "sum")]
    if kind != "fused":  # histories of padded rows
        whole += [({"history": HistoryConfig("din", (5,), "prelu")}, "mean")]
        whole += [({"history": HistoryConfig("din", (5,), "dice", normalize=True)}, "mean")]
    if kind != "collection":
        whole += [(ALONE, "mean"), ({**ALONE, "num_members": 2}, "mean")]
    for options, pooling in whole:
        model = recommender(whole_features(), embedding=EmbeddingConfig(kind=kind, dim=4, pooling=pooling), **options)
        torch.testing.assert_close(*both(model, whole_batch()))


def test_a_row_that_its_table_lacks_is_the_row_of_unseen_values():
    model = recommender(whole_features())
    inputs = plain_inputs(whole_batch(), model.features)
    network = PlainTables(model.members, model.outputs, model.features, tuple(inputs)).eval()

    def outputs(**changed: Tensor) -> Tensor:
        with torch.no_grad():
            return network(*{**inputs, **changed}.values())

    unseen = outputs(categorical=torch.zeros(4, 1, dtype=torch.int64))
    for row in (5, 400, -1):
        torch.testing.assert_close(outputs(categorical=torch.full((4, 1), row)), unseen)
    longer = torch.nn.functional.pad(inputs["list_0"], (0, 2), value=-1)
    torch.testing.assert_close(outputs(list_0=longer), outputs())


def test_a_graph_takes_batches_and_lists_of_any_length():
    history = HistoryConfig("din", (5,), "dice", normalize=True)
    model = recommender(whole_features(), embedding=EmbeddingConfig(dim=4), history=history)
    examples = example_inputs(model.features)
    network = PlainTables(model.members, model.outputs, model.features, tuple(examples)).eval()
    graph = Graph("model", network, examples, ("logits",), dynamic_axes(examples))
    inputs = plain_inputs(whole_batch(), model.features)
    with torch.no_grad():
        torch.testing.assert_close(capture(graph).module()(*inputs.values()), model(whole_batch()))
