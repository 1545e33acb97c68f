"""Charts of reports without their pixels, which take longer than most of a command."""

from __future__ import annotations

import functools
import io
from typing import Any

import pytest
from PIL import Image


@functools.cache
def _picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (300, 200), (250, 250, 250)).save(file, "PNG")
    return file.getvalue()


def _undrawn(spec: dict[str, Any], **_: Any) -> bytes:
    """Return an empty picture in place of the one that is drawn of a Vega-Lite specification."""
    assert "$schema" in spec
    return _picture()


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the specification of each chart, but draw none, in tests that do not ask for ``drawn``.

    tests/apps/report/page draws a chart of each kind.
    """
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("vl_convert.vegalite_to_png", _undrawn)


@pytest.fixture
def drawn() -> None:
    """Draw the charts of this test."""
