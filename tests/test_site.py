"""The site of docs/: each page is in the navigation and in llms.txt, and the API pages have each public name once."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

import core
from apps import registry
from apps.cli import main

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
PAGES = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
API = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference" / "api").glob("*.md"))


def loaded(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooks():
    return loaded(SITE["hooks"][0])


def pages_of(nav) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for below in (nav.values() if isinstance(nav, dict) else nav) for page in pages_of(below)]


def test_each_page_is_in_the_navigation_once(hooks):
    listed = [page for page in pages_of(hooks.expanded(SITE["nav"], DOCS)) if not page.startswith("runs/")]
    assert sorted(listed) == [page for page in PAGES if not page.startswith("runs/")]


def test_llms_txt_lists_each_page_by_its_title(hooks, tmp_path):
    class Config:
        docs_dir, site_dir, site_description = str(DOCS), str(tmp_path), SITE["site_description"]
        nav = hooks.expanded(SITE["nav"], DOCS)

    hooks.on_post_build(Config)
    written = (tmp_path / "llms.txt").read_text(encoding="utf-8")
    for page in pages_of(Config.nav):
        assert f"- [{hooks.title(DOCS / page)}]({page})" in written
        assert (tmp_path / page).read_bytes() == (DOCS / page).read_bytes()


def test_a_link_leads_to_the_page_of_a_file_outside_of_docs_and_a_folder_loses_its_link(hooks):
    text = "[a](../../configs/debug.yaml) [b](../index.md#x) [c](../runs) [d](https://example.org) [e](../../README.md)"
    made = hooks.relinked(text, DOCS / "start" / "gpu.md", "start/gpu.md", DOCS)
    assert made == (
        "[a](../source/configs/debug.yaml.md) [b](../index.md#x) c [d](https://example.org) [e](../source/README.md)"
    )


def test_objects_below_a_heading_are_a_level_deeper_and_those_of_apps_have_no_members(hooks):
    top, below = "    options:\n      heading_level: 2\n", "    options:\n      heading_level: 3\n"
    page = f"# API\n\n::: core.FFN\n{top}\n## Models\n\n::: apps.vision.model.ViTConfig\n{below}      members: false\n"
    assert hooks.with_options(page.replace(top, "").replace(f"{below}      members: false\n", "")) == page


def test_nothing_comes_from_a_network():
    assert SITE["theme"]["font"] is False
    assert not {"site_url", "repo_url", "extra_javascript", "extra_css"} & set(SITE)


def test_each_public_name_of_the_engine_is_on_one_api_page():
    found = Counter(re.findall(r"^::: core\.(\w+)$", API, flags=re.MULTILINE))
    assert found == Counter(core.__all__)


def test_each_registered_class_is_on_one_api_page():
    found = Counter(re.findall(r"^::: (apps\.\S+)$", API, flags=re.MULTILINE))
    paths = [registry.full_path(name) for name in (*registry.MODELS, *registry.DATA, *registry.TRAINER)]
    assert {path: found[path] for path in paths} == dict.fromkeys(paths, 1)
    assert max(found.values()) == 1


def test_each_name_of_an_api_page_exists():
    for path in re.findall(r"^::: ((?:apps|moesaic)\.\S+)$", API, flags=re.MULTILINE):
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path


def test_the_page_of_configurations_is_current():
    made = loaded("packaging/site/configs_page.py").page()
    written = (DOCS / "reference" / "configs.md").read_text(encoding="utf-8")
    assert written == made, "write it again: python packaging/site/configs_page.py"
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    assert set(re.findall(r"\]\(\.\./\.\./(configs/[\w./]+)\)", made)) == files


def test_the_page_of_commands_has_each_command(capsys):
    assert main(["--help"]) == 0
    commands = set(re.findall(r"^  (\w+)  ", capsys.readouterr().out, flags=re.MULTILINE))
    written = (DOCS / "reference" / "commands" / "index.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?`) \|", written, flags=re.MULTILINE)
    assert {word for row in rows for word in re.findall(r"`(\w+)`", row)} >= commands
