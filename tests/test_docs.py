"""docs/: its Python runs, its links lead somewhere, and every routing overlay has its entry and its picture."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import core
from apps import routers

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
ROUTING = (ROOT / "docs" / "routing.md").read_text(encoding="utf-8")


def slug(heading: str) -> str:
    """The anchor of a heading, as code hosts make it: letters, digits, hyphens and underscores stay."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    anchors = {slug(h) for h in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif "://" not in target:
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_the_gate_of_ones_own_passes_the_conformance_suite(tmp_path, monkeypatch):
    sources = re.findall(r"^```python\n(.*?)^```$", ROUTING, flags=re.DOTALL | re.MULTILINE)
    assert len(sources) == 1
    (tmp_path / "my_gates.py").write_text(sources[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    gates = importlib.import_module("my_gates")  # its last line is the check
    config = core.MoEConfig.from_dict({"num_experts": 4, "router": {"class_path": "my_gates.Loudest"}})
    assert config.router == gates.Loudest()


@pytest.mark.parametrize("name", routers.overlays())
def test_an_overlay_has_an_entry_and_a_picture(name):
    assert f"(img/routing/{name}.png)" in ROUTING
