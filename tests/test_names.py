"""Names in docstrings and in the developers' pages exist: a name that was changed in the code is changed there too."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

import core

FOREIGN = {
    *("my_module", "MyRouter", "is_set_to", "use_experts_implementation", "Untar", "Unzip", "AutoencoderKL", "Tensor"),
    *("commit_message", "create_pr", "force_download", "CombinedOptimizer", "allow_tf32", "read_NAME", "day_23"),
    *("_embedding_bag_per_sample_weights_backward", "sample_train", "sample_test", "recall_50", "data_tables"),
    *("_task", "_domain", "expert_task", "md", "png", "data_text", "core.NAME", "moesaic.form", "moesaic.computes"),
}
"""Names of other libraries and of files of data, and names that stand for others."""

MISSPELLED = "eludoMesrapS"[::-1].lower()
_QUOTED = re.compile(r"`{1,2}([A-Za-z_][\w.]*\w)`{1,2}")
_SYMBOL = re.compile(r"\w*_[A-Za-z]{1,3}$|[A-Za-z]$")
"""A number of a formula with its index: ``f_e``."""


def trees() -> Iterator[tuple[Path, str]]:
    for top in ("core", "apps", "moesaic", "benchmarks", "tests"):
        for path in sorted((ROOT / top).rglob("*.py")):
            yield path.relative_to(ROOT), path.read_text(encoding="utf-8")


def read(source: str) -> tuple[set[str], str]:
    """Return the names of a file's code, with the words of its texts, and its docstrings, also those of attributes."""
    own = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr)]
    texts = [v.value for v in own if isinstance(v, ast.Constant) and isinstance(v.value, str)]
    lines = source.splitlines()
    for value in own:
        if isinstance(value, ast.Constant):
            lines[value.lineno - 1 : value.end_lineno] = [""] * ((value.end_lineno or 0) - value.lineno + 1)
    return set(re.findall(r"\w+", "\n".join(lines))), "\n".join(texts)


def unknown(text: str, names: set[str], modules: dict[str, set[str]]) -> list[str]:
    """Return the quoted names of a text that nothing has: no part of it, or no such module where it is a path."""
    found = []
    for name in _QUOTED.findall(text):
        parts = [] if name in FOREIGN else name.split(".")
        if parts[:1] and parts[0] in ("core", "apps", "moesaic") and len(parts) > 1 and parts[-1] not in ("py", "md"):
            home = next((m for i in range(len(parts), 0, -1) if (m := ".".join(parts[:i])) in modules), None)
            rest = [] if home is None else parts[home.count(".") + 1 :]
            if home is None or (rest and rest[0] not in modules[home]):
                found.append(name)
        elif any(part not in names and not _SYMBOL.match(part) for part in parts):
            found.append(name)
    return found


@pytest.fixture(scope="module")
def known() -> tuple[set[str], dict[str, set[str]], dict[str, str]]:
    """The names of the tree, those of each module, and the texts to look into."""
    names, modules, texts = {*dir(builtins), *FOREIGN}, dict[str, set[str]](), dict[str, str]()
    for path, source in trees():
        own, text = read(source)
        names |= own | {*path.parts, path.stem}
        texts |= {} if path.parts[0] == "tests" else {str(path): text}
        module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        modules[module] = own | {p.stem for p in (ROOT / path).parent.iterdir()} if path.name == "__init__.py" else own
    modules["core"] |= {*core.__all__}
    for path in (ROOT / "configs").rglob("*.yaml"):
        names |= set(re.findall(r"\w+", path.read_text(encoding="utf-8")))
    for page in (*(ROOT / "docs/developers").glob("*.md"), ROOT / "CONTRIBUTING.md"):
        texts[str(page.relative_to(ROOT))] = page.read_text(encoding="utf-8")
    return names, modules, texts


def test_names_in_docstrings_and_pages_exist(known):
    names, modules, texts = known
    found = [f"{where}: {name}" for where, text in texts.items() for name in unknown(text, names, modules)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("``apps.registry.task_of``, ``core.MoEConfig`` and ``f_e``", []),
        ("``apps.registry.job_of``", ["apps.registry.job_of"]),
        ("`core.Nothing`", ["core.Nothing"]),
        (f"``{MISSPELLED}``", [MISSPELLED]),
    ],
)
def test_a_name_that_nothing_has_is_found(known, text, found):
    assert unknown(text, known[0], known[1]) == found
