"""The default network and training of a table."""

from pathlib import Path

import pytest

from apps.recsys.tables import recipe
from apps.recsys.tables.recipe import Size, network, trainer

ROOT = Path(__file__).parents[4]


@pytest.mark.parametrize(("num_rows", "batch_size", "epochs"), [
    (20, 32, 40),  # no batch is smaller
    (1_000, 32, 40),  # 1000 / 16 = 62.5: the power of two below it
    (13_158, 256, 40),
    (25_000, 256, 15),
    (31_000, 256, 8),
    (500_000, 512, 8),
])  # fmt: skip
def test_batches_and_epochs_follow_the_rows(num_rows, batch_size, epochs):
    size = Size(num_rows, has_ids=False, num_numbers=3, has_categories=True, are_numbers=False)
    assert (size.batch_size, size.epochs) == (batch_size, epochs)
    assert trainer(size)["max_epochs"] == epochs


def test_columns_and_tasks_change_dropout_rate_and_epochs():
    ids = Size(31_000, has_ids=True, num_numbers=0, has_categories=True, are_numbers=False)
    values = Size(31_000, has_ids=False, num_numbers=3, has_categories=False, are_numbers=True)
    assert (ids.epochs, ids.dropout, values.dropout) == (7, 0.1, 0.05)
    assert network(ids, sparse=False)["optimizer"]["lr"] == 0.002
    assert network(values, sparse=False)["optimizer"]["lr"] == 0.004
    assert "dense" not in network(ids, sparse=False)
    assert network(values, sparse=True)["shared"]["class_path"] == "core.MMoE"


def test_the_documentation_prints_the_rule():
    rule = recipe.__doc__.partition("\n\n- ")[2]
    assert f"- {rule}".strip() in (ROOT / "docs/reference/commands/init.md").read_text()


@pytest.mark.parametrize(("num_numbers", "kind"), [(1, "by_label"), (500, "by_label"), (501, "quantile_normal")])
def test_more_than_500_numbers_are_not_encoded_by_the_label(num_numbers, kind):
    size = Size(1_500, has_ids=False, num_numbers=num_numbers, has_categories=False, are_numbers=False)
    assert network(size, sparse=False)["dense"] == {"kind": kind}
