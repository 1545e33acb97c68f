"""Charts are drawn here, unlike in the tests of other folders."""

import pytest


@pytest.fixture(autouse=True)
def undrawn() -> None:
    pass
