"""SparseArch: three ways to hold the tables, one function."""

import copy
import pickle

import pytest
import torch
from made_table import columns as columns_of
from refusals import refused
from torch.testing import assert_close

from apps.recsys.encoding.features import CategoricalFeature
from apps.recsys.tables.columns.embedding import EmbeddingConfig
from apps.recsys.tables.columns.tables import sparse_arch

CITY, TAGS = CategoricalFeature("city", 3), CategoricalFeature("film.tags", 4, multi_valued=True)
SHOP = CategoricalFeature("shop", 4)
KINDS = ("joined", "fused", "collection")


def arch(features, copies=1, **options):
    torch.manual_seed(0)
    return sparse_arch(EmbeddingConfig(**{"dim": 4, "init_std": 1.0, **options}), features, copies)


def numbered(module):
    """Row r of the column c is (100 c + r) in all places."""
    for c, weight in enumerate(module.tables().values()):
        weight.copy_((100 * c + torch.arange(len(weight)).float())[:, None].expand_as(weight))
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_each_column_reads_its_own_rows(kind):
    # Columns side by side: city 2 is row 2; shop 3 is row 103.
    module = numbered(arch((CITY, SHOP), kind=kind))
    y_BH = module(*columns_of({"city": [[2], [0]], "shop": [[3], [1]]}))
    assert y_BH.tolist() == [[2.0] * 4 + [103.0] * 4, [0.0] * 4 + [101.0] * 4]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("pooling", "two"), [("mean", 102.0), ("sum", 204.0)])
def test_several_values_are_pooled_and_none_is_zero(kind, pooling, two):
    # Tags 1 and 3: rows 101 and 103, mean 102, sum 204. The second example has no tag.
    module = numbered(arch((CITY, TAGS), kind=kind, pooling=pooling))
    y_BH = module(*columns_of({"city": [[2], [1]], "film.tags": [[1, 3], []]}))
    assert (y_BH[:, 4].tolist(), y_BH[:, 0].tolist()) == ([two, 0.0], [2.0, 1.0])


@pytest.mark.parametrize("features", [(CITY, SHOP), (CITY, TAGS)], ids=["single", "multi"])
@pytest.mark.parametrize("copies", [1, 2])
def test_the_kinds_agree_on_start_output_and_step(features, copies):
    rows = [[0, 1], [], [3]] if features[1].multi_valued else [[1], [0], [3]]
    given = columns_of({"city": [[2], [2], [0]], features[1].name: rows})
    made = {kind: arch(features, copies, kind=kind, fused_optimizer="sgd", fused_lr=0.5) for kind in KINDS}
    weights = torch.arange(3 * 8.0).view(3, 8) / 10
    start = made["joined"](*given).detach()
    assert start.shape == ((3, 8) if copies == 1 else (2, 3, 8))
    for module in made.values():
        y = module(*given)
        assert_close(y, start)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        optimizer.zero_grad()
        (y * weights).sum().backward()
        optimizer.step()  # skips the fused tables, which have no gradient: they were stepped in the backward
    for name, weight in made["joined"].tables().items():
        assert_close(made["fused"].tables()[name], weight)
        assert_close(made["collection"].tables()[name], weight)


def test_copies_are_models_of_their_own_and_unseen_values_start_at_zero():
    # Copy k of a column is the k-th half of its row.
    module = arch((CITY, SHOP), copies=2)
    with torch.no_grad():
        module.weight[:, :4], module.weight[:, 4:] = 1.0, 2.0
    y_tBH = module(*columns_of({"city": [[1]], "shop": [[1]]}))
    assert y_tBH[:, 0].tolist() == [[1.0] * 8, [2.0] * 8]
    for kind in KINDS:
        for weight in arch((CITY, TAGS), kind=kind).tables().values():
            assert weight[0].abs().sum() == 0
            assert (weight[1:] != 0).all()


def test_bins_join_the_lookup_after_the_columns_and_one_beyond_its_table_is_named():
    module = numbered(arch((CITY, CategoricalFeature("age", 6))))
    y_BH = module(torch.tensor([[1, 2]]), bins_CB=torch.tensor([[5, 0]]))
    assert y_BH[:, [0, 4]].tolist() == [[1.0, 105.0], [2.0, 100.0]]
    only = numbered(arch((CategoricalFeature("age", 6),)))
    assert only(torch.zeros(0, 2), bins_CB=torch.tensor([[5, 0]]))[:, 0].tolist() == [5.0, 0.0]
    for columns in ((CITY, CategoricalFeature("age", 3)), (CITY, TAGS, CategoricalFeature("age", 3))):
        given = columns_of({"city": [[1], [2]], **({"film.tags": [[], [1, 2]]} if len(columns) == 3 else {})})
        with pytest.raises(ValueError, match="column 'age' has the row 3"):
            arch(columns)(*given, bins_CB=torch.tensor([[2, 3]]))


def test_widths_by_column_and_by_cardinality():
    # 6 * 16^(1/4) = 12; 6 * 1^(1/4) = 6, up to 8; at most 32.
    config = EmbeddingConfig(kind="collection", dim=32, dims={"shop": 3}, by_cardinality=True)
    columns = [CategoricalFeature("a", 16), CategoricalFeature("b", 1), SHOP, CategoricalFeature("c", 10**6)]
    assert [config.width(f) for f in columns] == [12, 8, 3, 32]
    module = sparse_arch(EmbeddingConfig(kind="collection", dim=2, dims={"shop": 3}), (CITY, SHOP), copies=2)
    city, shop = module.tables()["city"], module.tables()["shop"]
    assert (city.shape, shop.shape) == ((3, 4), (4, 6))
    y_tBH = module(*columns_of({"city": [[1]], "shop": [[2]]}))
    # Copy 1 is the second half of either row.
    assert_close(y_tBH[1, 0], torch.cat((city[1, 2:], shop[2, 3:])))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", [(CITY, SHOP), (CITY, TAGS)], ids=["single", "multi"])
def test_a_row_beyond_the_table_is_named(kind, features):
    # City has 3 rows: in the joined weight row 3 is the next column's first.
    name = features[1].name
    module = arch(features, kind=kind)
    with pytest.raises(ValueError, match="column 'city' has the row 3, and its table 3 rows, 0 to 2"):
        module(*columns_of({"city": [[1], [3]], name: [[0], [0]]}))
    with pytest.raises(ValueError, match=f"column '{name}' has the row -1, and its table 4 rows"):
        module(*columns_of({"city": [[1], [2]], name: [[0], [-1]]}))
    module(*columns_of({"city": [[1], [2]], name: [[0], [3]]}))


def test_other_columns_are_named():
    with pytest.raises(ValueError, match="the batch has 1 columns of one value and 0 of several, the model 2 and 0"):
        arch((CITY, SHOP))(*columns_of({"city": [[1]]}))
    with pytest.raises(ValueError, match="the batch has 1 columns of one value and 1 of several, the model 1 and 0"):
        arch((CITY,))(*columns_of({"city": [[1]], "tags": [[1, 2]]}))
    with pytest.raises(ValueError, match=r"embedding.dims names 'town', which is no column; there is city, shop"):
        sparse_arch(EmbeddingConfig(kind="collection", dims={"town": 4}), (CITY, SHOP))
    refused("column 'city' is there twice", lambda: sparse_arch(EmbeddingConfig(), (CITY, CITY)))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad"])
def test_a_copied_fused_table_goes_on_alone(how, optimizer):
    # The kernel's weight and the module's parameters are one memory: a plain copy would step one and read the other.
    given = columns_of({"city": [[1]], "film.tags": [[1, 2]]})
    one = arch((CITY, TAGS), kind="fused", fused_optimizer=optimizer)
    one(*given).sum().backward()
    two = how(one)
    before = copy.deepcopy(one.tables())
    for module in (one, two):
        module(*given).square().sum().backward()
    assert_close(two.tables(), one.tables())
    assert (one.tables()["city"][1] != before["city"][1]).all()
    assert_close(two.state_dict(), one.state_dict())


def test_the_fused_rate_follows_the_schedule_and_the_state_is_saved_and_read():
    given = columns_of({"city": [[1]], "shop": [[1]]})
    module = arch((CITY, SHOP), kind="fused", fused_optimizer="sgd", fused_lr=0.5)
    module.set_fused_lr(0.1)
    before = module.tables()["city"][1].clone()
    module(*given).sum().backward()
    assert_close(module.tables()["city"][1], before - 0.05)  # 0.5 * 0.1 * a gradient of 1
    given = columns_of({"city": [[1]], "shop": [[1]]})
    one, two = (arch((CITY, SHOP), kind="fused") for _ in range(2))
    one(*given).sum().backward()
    two.load_state_dict(one.state_dict())
    two.load_fused_state(one.fused_state())
    for module in (one, two):
        module(*given).sum().backward()
    assert_close(two.tables(), one.tables())
    refused("of other tables", lambda: two.load_fused_state({}))
    refused(r"does not fit embedding.kind='joined'", lambda: arch((CITY,)).load_fused_state(one.fused_state()))


def test_no_column_is_no_lookup_and_tables_decay_only_on_request():
    assert sparse_arch(EmbeddingConfig(), ()).out_dim == 0
    assert list(sparse_arch(EmbeddingConfig("fused"), ()).parameters()) == []
    assert arch((CITY,)).no_weight_decay() == {"weight"}
    assert arch((CITY,), weight_decay=True).no_weight_decay() == set()
    assert arch((TAGS,), kind="collection").no_weight_decay() == {"collection.embedding_bags.table_film_tags.weight"}
