"""The distributions: what they hold, and that a type checker reads the installed wheel."""

from __future__ import annotations

import re
import site
import subprocess
import sys
import tomllib
import venv
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

import core
import moesaic
from apps.base.checks import INSTALL

ROOT = Path(__file__).resolve().parents[1]
ENGINE = ROOT / "packaging" / "moesaic-core"
PACKAGES = {"moesaic": ("core", "apps", "moesaic"), "moesaic-core": ("core",)}


def project(folder: Path) -> dict:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("folder", [ROOT, ENGINE], ids=["moesaic", "moesaic-core"])
def test_a_distribution_has_its_packages_with_their_types(folder):
    config = project(folder)
    find, data = (config["tool"]["setuptools"][key] for key in ("packages", "package-data"))
    tops = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    packed = {top for top in tops if any(fnmatch(top, pattern) for pattern in find["find"]["include"])}
    assert packed == set(PACKAGES[config["project"]["name"]])
    assert "py.typed" in data["*"]
    assert all((ROOT / top / "py.typed").is_file() for top in packed)


def test_the_engine_has_the_version_of_all_and_needs_torch_alone():
    own, whole = project(ENGINE)["project"], project(ROOT)["project"]
    assert (own["version"], own["requires-python"]) == (whole["version"], whole["requires-python"])
    (needed,) = own["dependencies"]
    assert needed.startswith("torch>=")
    assert (ENGINE / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_what_is_typed_to_install_an_extra_works_in_a_clone():
    """No index has this package, so that no page or message may name it to pip, and the extras are there."""
    files = [ROOT / "README.md", ROOT / "Makefile", ROOT / "CONTRIBUTING.md"]
    files += [p for top in ("docs", "apps", "core", "moesaic", "configs") for p in (ROOT / top).rglob("*.*")]
    texts = {p: p.read_text(encoding="utf-8") for p in files if p.suffix in (".md", ".py", ".yaml", "")}
    asked = re.compile(r"""pip install (?:-[-\w]+ )*["']?([-\w./]*)\[([^\]]+)\]""")
    named = [(path, *match) for path, text in texts.items() for match in asked.findall(text)]
    assert [(path, name) for path, name, _ in named if name not in (".", "sacrebleu")] == []
    extras = {extra for _, name, some in named for extra in some.split(",") if name == "."}
    assert {"serve", "hub"} <= extras - {"{}"} <= project(ROOT)["project"]["optional-dependencies"].keys()
    assert INSTALL.format("serve") == 'pip install -e ".[serve]" in the source tree of moesaic'


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel, and the libraries of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves files there
    source.mkdir()
    for name in ("core", "apps", "moesaic", "configs", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv")
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(packages)
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()))
    return folder / "venv" / "bin" / "python"


@pytest.mark.slow
def test_mypy_reads_the_installed_wheel(python, tmp_path):
    names = [f"moesaic.{name}" for name in moesaic.__all__] + [f"core.{name}" for name in core.__all__]
    lines = ["import core", "import moesaic", 'moesaic.MoEConfig(num_experts="eight")']
    lines += ['reveal_type(moesaic.load("run"))', 'reveal_type(moesaic.fit("run.yaml").metrics)']
    (tmp_path / "script.py").write_text("\n".join([*lines, *(f"reveal_type({name})" for name in names)]))
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(python), "script.py"]
    done = subprocess.run(command, cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True)
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert len(errors) == 1, done.stdout
    assert 'script.py:3: error: Argument "num_experts" to "MoEConfig" has incompatible type "str"' in errors[0]
    loaded, metrics, *revealed = re.findall(r'Revealed type is "(.*)"$', done.stdout, flags=re.MULTILINE)
    assert loaded == "apps.train.checkpoint.linked.LinkedModule | apps.train.sparsified.SparsifiedModule"
    assert metrics == "typing.Mapping[str, float]"
    assert len(revealed) == len(names)
    for name, kind in zip(names, revealed, strict=True):
        # A parameter may take anything, such as a batch; what comes back has a type.
        assert kind != "Any", name
        assert "Any" not in kind.rpartition(" -> ")[2], f"{name}: {kind}"
    for kind in revealed[: len(moesaic.__all__) - len(core.__all__)]:  # the commands
        assert "Any" not in kind, kind
