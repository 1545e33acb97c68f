"""A table of every kind of column."""

import pytest
from own_table import CONFIG, write


@pytest.fixture
def own(tmp_path):
    """Makes a TableData of the table above, with changes."""
    # Here, and not above: it imports Triton, which must not be read before tests/conftest.py has set the interpreter.
    from apps.recsys.tables.data import TableData

    write(tmp_path)

    def make(config=CONFIG, kind="csv", **options):
        files = {"train_file": f"train.{kind}", "test_file": f"test.{kind}"}
        return TableData(
            "table", str(tmp_path), str(tmp_path / "cache"), table=config, **{**files, "seed": 0, **options}
        )

    return make
