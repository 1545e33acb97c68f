"""Items drawn as negatives for tables of positives alone: which they are, what they bring, and what is learned."""

import dataclasses
import math
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from own_table import by_row
from quiet_trainer import quiet_trainer
from refusals import refused
from torch.testing import assert_close

from apps.recsys.schema import SplitConfig, TableConfig, TaskConfig
from apps.recsys.tables.data import TableData
from apps.recsys.tables.module import MultiTaskRecommender
from apps.recsys.tables.negatives.draws import ItemDraws
from apps.recsys.tables.negatives.sampled_items import RowsWithItems
from apps.recsys.tables.negatives.sampled_rows import SampledPlan
from apps.recsys.tables.report.report import RecommenderReportConfig
from apps.recsys.tables.rows.arrays import gather
from apps.report.page import load_sections

# Rows 0 to 7 train, 8 and 9 validate, 10 and 11 test. Of the training rows 4 are tea, 2 rye, one oat and one fig.
USER = ["ann", "ann", "bob", "bob", "cy", "cy", "ann", "bob", "ann", "zoe", "bob", "cy"]
ITEM = ["tea", "rye", "tea", "oat", "tea", "rye", "tea", "fig", "oat", "tea", "rye", "nut"]
PRICE = {"tea": 3.5, "rye": 2.0, "oat": None, "fig": 4.0, "nut": 1.0}
KIND = {"tea": "drink", "rye": "grain", "oat": "grain", "fig": None, "nut": "seed"}
TAGS = {"tea": ["x", "y"], "rye": [], "oat": ["y"], "fig": ["x"], "nut": ["x"]}
IMAGE = {"tea": [1.0, 2.0], "rye": [0.0, 1.0], "oat": None, "fig": [3.0, 3.0], "nut": [0.0, 0.0]}

COLUMNS = {
    "user": USER,
    "item": ITEM,
    "hour": [float(row) for row in range(12)],
    "price": [PRICE[item] for item in ITEM],
    "kind": [KIND[item] for item in ITEM],
    "tags": [TAGS[item][:: -1 if row == 2 else 1] for row, item in enumerate(ITEM)],  # an order that says nothing
    "image": pa.array([IMAGE[item] for item in ITEM], pa.list_(pa.float32())),
    "shop": ["de", "fr", "de", "de", "fr", "de", "fr", "de", "de", "fr", "de", "fr"],
}
MOVES = ("price", "kind", "tags", "image")
RULE = {"kind": "items", "column": "item", "per_positive": 3, "item_features": MOVES, "eval_per_positive": 2}
TABLE = TableConfig(
    ("user", "item", "kind"), ("tags",), ("hour", "price"), domain="shop", user="user", vectors=("image",),
    split=SplitConfig("given"),
)  # fmt: skip


def data_of(tmp_path, table=TABLE, columns=COLUMNS, rule=RULE, **options):
    whole = pa.table(columns)
    for name, (begin, end) in {"train": (0, 8), "val": (8, 10), "test": (10, 12)}.items():
        pq.write_table(whole[begin:end], tmp_path / f"{name}.parquet")
    files = {f"{name}_file": f"{name}.parquet" for name in ("train", "val", "test")}
    options = {"batch_size": 8, "seed": 0, "table": table, "negatives": rule, **files, **options}
    return TableData("table", str(tmp_path), str(tmp_path / "cache"), **options)


def epoch_of(loader, epoch=0):
    loader.batch_sampler.sampler.set_epoch(epoch)
    return list(loader)


def rows_of(data, batches):
    """Return each row's number, item, columns and label, by the table's own values."""
    items, kinds, tags = (data.vocabulary(column) for column in ("item", "kind", "tags"))
    rows = []
    for batch in batches:
        for row, vector in zip(by_row(batch, data.features), batch.vector_BV.tolist(), strict=True):
            hour, price = row["dense"]
            own = (items[row["item"][0]], price, kinds[row["kind"][0]], [tags[t] for t in row["tags"]], vector)
            rows.append((row["index"], own, hour, row["domain"], row["user"], row["label"]))
    return rows


def test_drawn_rows_have_another_item_with_its_columns(tmp_path):
    data = data_of(tmp_path)
    assert (data.features.tasks, data.features.positives) == (("positive",), (1 / 4,))
    loader = data.train_dataloader()
    batches = epoch_of(loader)
    assert (len(loader), [len(batch) for batch in batches]) == (4, [8] * 4)  # 8 rows, and 3 times more
    user_of = {name: number for number, name in enumerate(data.vocabulary("user"))}
    rows = rows_of(data, batches)
    assert sorted(index for index, *_ in rows) == sorted([*range(8)] * 4)
    drawn = set()
    for index, (item, price, kind, tags, vector), hour, domain, user, label in rows:
        assert (label == [1.0]) == (item == ITEM[index])
        assert label in ([0.0], [1.0])
        drawn |= set() if label[0] else {item}
        # the item's
        assert repr(price) == repr(math.nan if PRICE[item] is None else PRICE[item])
        assert (kind, sorted(tags)) == (KIND[item], sorted(TAGS[item]))
        assert repr(vector) == repr([math.nan] * 2 if IMAGE[item] is None else IMAGE[item])
        # the row's
        assert (hour, user, data.domain_values[domain]) == (index, [user_of[USER[index]]], COLUMNS["shop"][index])
    assert sum(label[0] for *_, label in rows) == 8
    assert drawn == {"tea", "rye", "oat", "fig"}


def test_an_epoch_depends_on_the_seed_and_its_number_alone(tmp_path):
    loader = data_of(tmp_path).train_dataloader()
    first, second = (repr(rows_of(data_of(tmp_path), epoch_of(loader, epoch))) for epoch in (0, 1))
    assert first != second
    (positions,) = SampledPlan(loader.dataset.source, 32, drop_last=False).batches(0, 1)
    elsewhere = pickle.loads(pickle.dumps(loader.dataset.source)).__getitems__(positions)  # as in a worker process
    assert repr(rows_of(data_of(tmp_path), [elsewhere])) == second
    resumed = data_of(tmp_path).train_dataloader()
    resumed.load_state_dict({"epoch": 1, "served": 3, "seed": 0})
    rest = rows_of(data_of(tmp_path), epoch_of(resumed, 1))
    assert repr(rows_of(data_of(tmp_path), epoch_of(loader, 1))[24:]) == repr(rest)
    # 32 rows on 3 processes: 11 each, and one is repeated.
    examples = data_of(tmp_path).examples("train")
    shared = torch.cat(list(SampledPlan(examples, 4, drop_last=False, num_processes=3).batches(0, 1)))
    alone = torch.cat(list(SampledPlan(examples, 4, drop_last=False).batches(0, 1)))
    assert len(shared) == 33
    assert torch.equal(shared.unique(), alone.unique())


def full_draws(rows: RowsWithItems):
    """Return every row with every draw that it can have, and the share of the row's draws that each stands for."""
    positions, shares = [torch.arange(len(rows.rows))], [torch.ones(len(rows.rows))]
    for k in range(len(rows.rows)):
        left = int(rows.draws.left_K[rows._key_N[k]])
        middles = (torch.arange(left).double() + 0.5) / left  # each place on the line of what is left once
        items = rows.draws.items(middles[None], rows._key_N[k : k + 1])[0]
        positions.append(k + len(rows.rows) * items)
        shares.append(torch.full((left,), rows.per_positive / left))
    return rows.__getitems__(torch.cat(positions)), torch.cat(shares)


@pytest.mark.parametrize("distribution", ["uniform", "frequency"])
def test_the_best_logits_are_those_of_the_full_table(tmp_path, distribution):
    # Without columns of the row a logit an item: tea is in 4 of 8 rows, so its best probability is 1/2, that of rye
    # 1/4, those of oat and fig 1/8. They are the stationary point of the loss over all draws that can be.
    data = data_of(tmp_path, rule={**RULE, "distribution": distribution})
    batch, share_B = full_draws(data.examples("train"))
    item_B = batch.single_FB[[f.name for f in data.features.single].index("item")]
    probability_I = torch.tensor([0.0, *(ITEM[:8].count(item) / 8 for item in data.vocabulary("item")[1:])])
    logit_I = probability_I.logit().requires_grad_()
    trained_B = logit_I[item_B] + batch.offset_Bt[:, 0]
    loss_B = F.binary_cross_entropy_with_logits(trained_B, batch.label_Bt[:, 0], reduction="none")
    (loss_B * batch.weight_Bt[:, 0] * share_B).sum().backward()
    assert_close(logit_I.grad[1:], torch.zeros(4), rtol=0, atol=1e-6)
    # Item j stands beside each row that is not j's 3 q_j times: tea 3/4 or 3/2 times.
    is_tea_B = (item_B == data.vocabulary("item").index("tea")) & (batch.label_Bt[:, 0] == 0)
    times = 3 / 4 if distribution == "uniform" else 3 / 2
    assert_close((batch.weight_Bt[:, 0] * share_B)[is_tea_B].sum(), torch.tensor(4 * times))
    assert_close(batch.offset_Bt[is_tea_B].unique(), torch.tensor([-math.log(times)]))


@pytest.mark.parametrize(("exclude_seen", "others"), [(False, 8 * 3), (True, 3 * 2 + 3 * 1 + 2 * 2)])
def test_the_best_constant_is_the_share_of_the_full_table(tmp_path, exclude_seen, others):
    # Beside 8 positives stand 3 items each; or what the users lack of four: ann two items, bob one, cy two.
    data = data_of(tmp_path, rule={**RULE, "exclude_seen": exclude_seen})
    batch, share_B = full_draws(data.examples("train"))
    z = torch.tensor(math.log(8 / others), requires_grad=True)
    loss_B = F.binary_cross_entropy_with_logits(z + batch.offset_Bt[:, 0], batch.label_Bt[:, 0], reduction="none")
    (loss_B * batch.weight_Bt[:, 0] * share_B).sum().backward()
    assert_close(z.grad, torch.tensor(0.0), rtol=0, atol=1e-6)


def test_what_a_user_has_is_never_drawn(tmp_path):
    data = data_of(tmp_path, rule={**RULE, "exclude_seen": True})
    has = {user: {i for u, i in zip(USER[:8], ITEM[:8], strict=True) if u == user} for user in USER}
    loader = data.train_dataloader()
    rows = [row for epoch in range(5) for row in rows_of(data, epoch_of(loader, epoch))]
    drawn = [(USER[row], own[0]) for row, own, *_, label in rows if not label[0]]
    assert len(drawn) == 5 * 24
    assert {(user, item) for user in ("ann", "bob", "cy") for item in PRICE.keys() - has[user] - {"nut"}} == {*drawn}
    # The rows of the split count too: ann has oat in validation, bob rye in the test, where nothing is left for him.
    val = [(USER[row], own[0]) for row, own, *_, y in rows_of(data, [data.examples("val")[:]]) if not y[0]]
    assert val[:2] == [("ann", "fig")] * 2
    assert {user for user, _ in val[2:]} == {"zoe"}
    refused("exclude_seen=True: the user of row 10 has all 4 items of column 'item'", lambda: data.examples("test"))


def test_evaluation_draws_once_and_its_metrics_are_of_the_drawn_rows(tmp_path):
    first = data_of(tmp_path)
    rule = {**RULE, "per_positive": 1, "distribution": "frequency"}
    second = data_of(tmp_path, rule=rule, seed=5, batch_size=3)
    for split in ("val", "test"):
        (batch,), (other,) = getattr(first, f"{split}_dataloader")(), getattr(second, f"{split}_dataloader")()
        assert repr(rows_of(first, [batch])) == repr(rows_of(second, [other]))
        begin = {"val": 8, "test": 10}[split]
        assert batch.index_B.tolist() == [begin] * 3 + [begin + 1] * 3
        assert (batch.label_Bt[:, 0].tolist(), batch.weight_Bt, other.weight_Bt) == ([1, 0, 0] * 2, None, None)
        # 2 of the 3 others are drawn; of all 4 where training lacks the row's item, the nut of row 11.
        left = [3, 4] if split == "test" else [3, 3]
        assert_close(batch.offset_Bt[:, 0], torch.tensor([math.log(n / 2) for n in left]).repeat_interleave(3))
    train = gather(first, "train")  # what trees and linear models learn from
    assert train.label_Nt[:, 0].tolist() == [1, 0, 0] * 8
    batch, _ = (data_of(tmp_path, rule={**RULE, "correct": False}).examples(s)[:1] for s in ("val", "test"))
    assert batch.offset_Bt is None
    data = data_of(tmp_path)
    model = MultiTaskRecommender(data.features)
    (batch,) = data.val_dataloader()
    z = model.eval()(batch)
    out = model.task_loss(batch)
    assert_close(out.outputs, z + math.log(3 / 2))
    assert_close(out.terms["loss_positive"], F.binary_cross_entropy_with_logits(z + math.log(3 / 2), batch.label_Bt))
    # Test rows are predicted as they are.
    (own,) = data.predict_dataloader()
    assert (own.index_B.tolist(), own.label_Bt[:, 0].tolist(), own.offset_Bt) == ([10, 11], [1, 1], None)


def test_tasks_of_positives_have_weights_and_missing_labels(tmp_path):
    columns = {**COLUMNS, "click": [1] * 12, "buy": [1, None] * 6}
    config = {"click": TaskConfig("click"), "buy": TaskConfig("buy")}
    table = TableConfig(("item",), tasks=config, weight="hour", split=SplitConfig("given"))
    rule = {"kind": "items", "column": "item", "per_positive": 2}
    data = data_of(tmp_path, table, columns, rule)
    (batch,) = epoch_of(data_of(tmp_path, table, columns, rule, batch_size=24).train_dataloader())
    assert data.features.positives == (1 / 4, 1 / 4)
    for row in range(8):
        of_row = batch.index_B == row
        click, buy = batch.label_Bt[of_row].sort(dim=0, descending=True).values.T.tolist()
        assert click == [1, 0, 0]
        assert repr(buy) == repr([1.0, 0.0, 0.0] if row % 2 == 0 else [math.nan] * 3)
        # The weights 0 to 7 have the mean 3.5 in clicks; a drawn row counts 3/4 as much, or 1 - 1/4.
        weights = batch.weight_Bt[of_row, 0].sort(descending=True).values
        assert_close(weights, row / 3.5 * torch.tensor([1.0, 0.75, 0.75]))
    # 12 in all over 8 training rows, divided by their mean 3/2.
    weight = [1.0, 2.0] * 6
    data = data_of(tmp_path, dataclasses.replace(TABLE, weight="weight"), {**COLUMNS, "weight": weight})
    assert_close(data.opened["weight"][:4, 0], torch.tensor([2 / 3, 4 / 3, 2 / 3, 4 / 3]))


def test_rows_without_an_item_do_not_train_and_a_column_that_stays_is_named(tmp_path, caplog):
    caplog.set_level("INFO")
    columns = {**COLUMNS, "item": [None, *ITEM[1:]]}
    data = data_of(tmp_path, columns=columns)
    data.setup("fit")
    expected = (
        "negatives of each positive row: 3 of 4 items of column item, sampled again in each epoch (uniform), labeled "
        "0; 1 training rows without a known item are left out"
    )
    assert expected in caplog.text
    assert "val: 2 positive rows, and for each 2 of 4 items of column item, sampled once (uniform)" in caplog.text
    assert "labeled 0: metrics are of these 6 rows" in caplog.text
    assert "item_features" not in caplog.text
    batches = epoch_of(data.train_dataloader())
    assert sorted({int(row) for batch in batches for row in batch.index_B}) == [*range(1, 8)]
    # A column that stays with the positive is named.
    caplog.clear()
    caplog.set_level("WARNING")
    data_of(tmp_path, rule={**RULE, "item_features": ["tags", "image"]}).setup("fit")
    lines = [record.getMessage() for record in caplog.records]
    assert [line.partition(" has one value for each item and is not in")[0] for line in lines] == [
        "column 'kind'",
        "column 'price'",
    ]


def test_the_domain_and_the_parts_of_a_time_move_too(tmp_path):
    made = {"tea": "2024-01-01 05:00", "rye": "2024-01-02 06:00", "oat": "2024-01-03 07:00", "fig": "2024-01-04 08:00"}
    columns = {
        "item": ITEM[:8],
        "made": [made[item] for item in ITEM[:8]],
        "shelf": [{"tea": "a", "rye": "b", "oat": "b", "fig": "a"}[item] for item in ITEM[:8]],
    }
    columns = {name: [*values, *values[:4]] for name, values in columns.items()}
    table = TableConfig(("item",), timestamps=("made",), domain="shelf", split=SplitConfig("given"))
    rule = {"kind": "items", "column": "item", "item_features": ["made", "shelf"]}
    data = data_of(tmp_path, table, columns, rule)
    items, hours = data.vocabulary("item"), data.vocabulary("made_hour")
    for batch in epoch_of(data.train_dataloader()):
        for row in by_row(batch, data.features):
            item = items[row["item"][0]]
            assert int(hours[row["made_hour"][0]]) == int(made[item][11:13])
            assert data.domain_values[row["domain"]] == {"tea": "a", "rye": "b", "oat": "b", "fig": "a"}[item]


def test_a_model_is_trained_tested_and_reported(tmp_path):
    data = data_of(tmp_path)
    model = MultiTaskRecommender(data.features, report=RecommenderReportConfig(pictures=False))
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(model, data)
    assert 0 <= trainer.callback_metrics["val/auc_positive"] <= 1
    (metrics,) = trainer.test(model, data, verbose=False)
    assert 0 <= metrics["test/auc"] <= 1
    (section,) = (s for s in load_sections(tmp_path / "report") if s.title == "Sampled negatives")
    (line,) = section.parts[0].lines
    assert line == (
        "test: 2 positive rows, and for each 2 of 4 items of column item, sampled once (uniform) and labeled 0: "
        "metrics are of these 6 rows"
    )


REFUSED = [
    ({"column": "items"}, {}, "negatives.column='items' is not one of user, item, kind; did you mean 'item'"),
    ({"column": "tags", "item_features": []}, {}, "negatives.column='tags' is not one of user, item, kind"),
    ({"column": None}, {}, "negatives.kind='items' needs negatives.column, the column of the items to draw"),
    ({"per_positive": 0.5}, {}, "negatives.per_positive=0.5 must be an integer of at least 1 with kind 'items'"),
    ({"kind": "rows"}, {}, "negatives.column='item' is for kind 'items', not 'rows'"),
    ({"item_features": ["item"]}, {}, "negatives.item_features names 'item', which is negatives.column itself"),
    ({"item_features": ["prize"]}, {}, "negatives.item_features='prize' is not one of .*; did you mean 'price'"),
    ({"item_features": ["hour"]}, {},
     "names 'hour', which must have one value for each item, but the item 'tea' has 0 in row 0 and 2 in row 2"),
    ({}, {"columns": {**COLUMNS, "kind": ["drink", *COLUMNS["kind"][1:4], None, *COLUMNS["kind"][5:]]}},
     "but the item 'tea' has 'drink' in row 0 and no known value in row 4"),
    ({}, {"columns": {**COLUMNS, "tags": [*COLUMNS["tags"][:6], ["x"], *COLUMNS["tags"][7:]]}},
     r"but the item 'tea' has \['x', 'y'\] in row 0 and \['x'\] in row 6"),
    ({"item_features": ["shop"]}, {}, "but the item 'tea' has 'de' in row 0 and 'fr' in row 4"),
    ({}, {"columns": {**COLUMNS, "item": ["tea"] * 12}},
     "negatives.column='item' has 1 of the values that the model knows in the training rows: there must be two"),
    ({"exclude_seen": True}, {"user": None}, "negatives.exclude_seen=True needs table.user"),
    ({}, {"hash_rows": {"item": 9}}, "negatives.column='item' is in hash_rows: each item must have a row of its own"),
    ({}, {"tasks": {"click": TaskConfig("hour", at_least=3)}},
     "is for tables of positives alone, and task 'click' is 0 in row 0: leave such rows out, or take kind 'rows'"),
    ({}, {"tasks": {"click": TaskConfig("hour", at_least=0), "price": TaskConfig("hour", kind="regression")}},
     "negatives.kind='items' needs tasks of yes and no, and task 'price' is of kind 'regression'"),
    ({"task": "buy"}, {"tasks": {"click": TaskConfig("hour", at_least=0)}},
     "negatives.task='buy' names the task of a table without one, and this has click"),
    ({"item_features": ["last"]},
     {"columns": {**COLUMNS, "last": [[]] * 12}, "sequences": {"last": {"items": "item"}}},
     "negatives.item_features names 'last', a sequence"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "changes", "match"), REFUSED)
def test_refused(tmp_path, rule, changes, match):
    columns = changes.get("columns", COLUMNS)
    if "tasks" in changes:
        changes = {**changes, "continuous": ("price",)}
    table = {name: getattr(TABLE, name) for name in TABLE.__dataclass_fields__}
    table |= {name: value for name, value in changes.items() if name != "columns"}
    with pytest.raises(ValueError, match=match) as raised:
        data_of(tmp_path, table, columns, {**RULE, **rule}).examples("train")
    assert "\n" not in str(raised.value)


def test_draws_are_places_on_the_line_of_what_is_left():
    # Weights 2, 0, 1, 3: the line is 0 0 2 3 3 3. Key 0 excludes item 0, key 1 items 1 and 2, key 2 none.
    draws = ItemDraws(torch.tensor([2, 0, 1, 3]), torch.tensor([1, 0, 1, 1]), torch.tensor([2, 0, 1, 2]), 3)
    assert (draws.total, draws.left_K.tolist()) == (6, [4, 5, 6])
    uniform_3n = torch.tensor([[0.0, 0.24, 0.26, 0.99], [0.0, 0.39, 0.41, 0.99], [0.0, 0.34, 0.49, 0.51]]).double()
    assert draws.items(uniform_3n, torch.arange(3)).tolist() == [[2, 2, 3, 3], [0, 0, 3, 3], [0, 2, 2, 3]]
    generator = torch.Generator().manual_seed(0)
    weight_I = torch.randint(0, 5, (30,), generator=generator)
    key_M, item_M = torch.randint(0, 8, (90,), generator=generator), torch.randint(0, 30, (90,), generator=generator)
    draws = ItemDraws(weight_I, key_M, item_M, 9)  # key 8 excludes nothing
    key_N = torch.randint(0, 9, (200,), generator=generator)
    uniform_Nn = torch.rand(200, 5, dtype=torch.float64, generator=generator)
    uniform_Nn[0] = torch.tensor([0.0, 0.5, 1 - 2**-53, 1 - 2**-53, 0.0])
    excluded = [{int(i) for k, i in zip(key_M, item_M, strict=True) if k == key} for key in range(9)]
    expected = []
    for key, row in zip(key_N.tolist(), uniform_Nn.tolist(), strict=True):
        line = [i for i, weight in enumerate(weight_I.tolist()) if i not in excluded[key] for _ in range(weight)]
        assert int(draws.left_K[key]) == len(line)
        expected.append([line[min(int(u * len(line)), len(line) - 1)] for u in row])  # a product may round up
    assert draws.items(uniform_Nn, key_N).tolist() == expected
