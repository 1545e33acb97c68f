"""docs/: its Python runs, its links and paths lead somewhere, and every routing overlay has an entry and a picture."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from undrawn import undrawn as undrawn

import core
from apps.cli import main
from apps.cli.command import _OTHERS
from apps.cli.options import COMMANDS as RUNS
from apps.compare.suite.file import Suite
from apps.compare.suite.standings import Figures, leaderboard_page, standings
from apps.equal_cost import routers
from apps.report.page import html
from apps.report.page.writing import markdown
from core.diagnose.rules import REMEDIES

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
ALL_PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *PAGES]
ROUTERS = {page.name: page.read_text(encoding="utf-8") for page in (ROOT / "docs/reference/routers").glob("*.md")}
# Pages with a test of their own, or whose code is not to be run.
OWN_TEST = ("train_on_your_own_table", "write_a_router", "write_an_expert")
SLOW = ("choose_a_router", "choose_the_number_of_experts_and_k", "compare_at_equal_time", "compare_with_boosted_trees")
SLOW += ("compile_a_model", "export_for_torch_or_cpp", "test_cheaper_forms")
HOW_TO = sorted(
    page.stem
    for page in (ROOT / "docs" / "how_to").glob("*.md")
    if page.stem not in OWN_TEST and re.search(r"^```(sh|python)$", page.read_text(encoding="utf-8"), re.MULTILINE)
)
VISION = (ROOT / "docs" / "vision.md").read_text(encoding="utf-8")


def slug(heading: str) -> str:
    """Return the anchor of a heading, as code hosts make it: letters, digits, hyphens and underscores stay."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(h) for h in re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)}


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", ALL_PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


# A path or a dotted name that stands in a page for one of the reader's own.
PLACEHOLDER = re.compile(r"NAME|YOUR|Your|[*{<]|\.\.\.")


def exists(name: str) -> bool:
    """Return whether a dotted name is a module of the tree, or an attribute below one."""
    parts = name.split(".")
    module = next(
        n
        for n in range(len(parts), 0, -1)
        if (ROOT / Path(*parts[:n])).is_dir() or (ROOT / Path(*parts[:n])).with_suffix(".py").is_file()
    )
    if module == len(parts):
        return True
    target: object = importlib.import_module(".".join(parts[:module]))
    for part in parts[module:]:
        fields = getattr(target, "__dataclass_fields__", {})
        if not hasattr(target, part) and part not in fields:
            return False
        target = getattr(target, part, None)
    return True


@pytest.mark.parametrize("page", ALL_PAGES, ids=page_id)
def test_paths_and_dotted_names_exist(page):
    text = page.read_text(encoding="utf-8")
    paths = re.findall(
        r"(?<![\w/.])(?:apps|core|tests|configs|benchmarks|examples(?=/\w+\.py)|packaging)/[\w./*{}<>-]*", text
    )
    missing = [p for p in paths if not PLACEHOLDER.search(p) and not (ROOT / p.rstrip(".")).exists()]
    names = re.findall(r"(?<![\w/.-])(?:apps|core)(?:\.[A-Za-z_]\w*)+(?!/)", text)
    missing += [n for n in names if not PLACEHOLDER.search(n) and not n.endswith(".py") and not exists(n)]
    assert missing == []


@pytest.mark.parametrize("command", [*RUNS, *_OTHERS])
def test_the_pages_that_a_command_s_help_names_are_about_it(command, capsys):
    assert main([command, "--help"]) == 0
    for page in re.findall(r"docs/[\w/.]+\.md", " ".join(capsys.readouterr().out.split())):
        assert f"moesaic {command}" in (ROOT / page).read_text(encoding="utf-8"), page


def test_the_pages_that_the_code_names_exist():
    sources = [path for top in ("apps", "core", "moesaic", "configs") for path in (ROOT / top).rglob("*.*")]
    texts = [path.read_text(encoding="utf-8") for path in sources if path.suffix in (".py", ".yaml", ".html")]
    pages = {page for text in texts for page in re.findall(r"\bdocs/[\w/]+\.md", text)}
    assert {"docs/concepts/planning.md", "docs/reference/onnx_scripts.md"} <= pages
    assert [page for page in pages if not (ROOT / page).is_file()] == []


def test_the_leaderboard_is_that_of_its_suite_and_figures(monkeypatch):
    monkeypatch.chdir(ROOT)
    suite = Suite.read(Path("configs/suites/recommenders.yaml"))
    boards = [standings(board, suite, Figures(suite.figures_folder)) for board in suite.boards]
    again = f"{' '.join(suite.command())} --minutes 0"
    page = leaderboard_page(suite, boards, "", brief=True)
    assert suite.leaderboard_file.read_text(encoding="utf-8") == markdown(page), f"write it again: {again}"


@pytest.mark.parametrize("top", ["core", "apps"])
def test_the_tree_of_packages_is_the_tree(top):
    tree = blocks((ROOT / "docs" / "developers" / "architecture.md").read_text(encoding="utf-8"), "")[0]
    part = tree.partition(f"{top}/ ")[2]
    listed = re.search(r"^(.*\n)((?:  .*\n)*)", part)[2]
    rooms = {path.parent.name for path in (ROOT / top).glob("*/__init__.py")}
    assert set(re.findall(r"^  (\w+)/", listed, flags=re.MULTILINE)) == rooms
    files = {path.name for path in (ROOT / top).glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"\b\w+\.py\b", listed)) == files


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(("page", "module"), [("write_a_router", "my_routers"), ("write_an_expert", "my_experts")])
def test_a_router_and_an_expert_of_ones_own_pass_the_conformance_suite(page, module, tmp_path, monkeypatch):
    (source,) = blocks((ROOT / "docs" / "how_to" / f"{page}.md").read_text(encoding="utf-8"), "python")
    (tmp_path / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = importlib.import_module(module)  # its last line is the check
    if page == "write_a_router":
        config = core.MoEConfig.from_dict({"num_experts": 4, "router": {"class_path": "my_routers.Loudest"}})
        assert config.router == own.Loudest()
    else:
        config = core.MoEConfig.from_dict({"num_experts": 4, "expert": {"class_path": "my_experts.Linear"}})
        assert config.expert == own.Linear()


@pytest.mark.parametrize("name", routers.overlays())
def test_an_overlay_has_a_row_in_the_index_an_entry_and_a_picture(name):
    assert f"(../../../configs/routing/{name}.yaml)" in ROUTERS["index.md"]
    (page,) = (text for text in ROUTERS.values() if f"(../../img/routing/{name}.png)" in text)
    (entry,) = (p for p in re.split(r"^##? ", page, flags=re.MULTILINE) if f"(../../img/routing/{name}.png)" in p)
    assert f"(../../../configs/routing/{name}.yaml)" in entry
    assert all(word in entry for word in ("**When:**", "**Cost:**"))


def public_configs(base: type) -> list[type]:
    kinds = (getattr(core, name) for name in core.__all__)
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, base) and kind is not base]


@pytest.mark.parametrize("kind", public_configs(core.RouterConfig), ids=lambda kind: kind.__name__)
def test_every_option_of_a_router_is_in_its_entry(kind):
    shared = {"top_k", "normalize", "init_scale"}
    assert all(f"| `{option}` |" in ROUTERS["index.md"] for option in shared)
    pages = [page for name, page in ROUTERS.items() if name != "index.md"]
    entries = [
        part for page in pages for part in re.split(r"^##? ", page, flags=re.MULTILINE) if f"`{kind.__name__}(" in part
    ]
    options = {field.name for field in dataclasses.fields(kind)} - shared
    assert [name for name in options if not any(re.search(rf"\b{name}\b", entry) for entry in entries)] == []


@pytest.mark.parametrize("kind", public_configs(core.ExpertConfig), ids=lambda kind: kind.__name__)
def test_every_option_of_an_expert_is_in_its_entry(kind):
    page = (ROOT / "docs" / "reference" / "experts.md").read_text(encoding="utf-8")
    entry = "".join(part for part in page.split("\n## ") if f"`{kind.__name__}(" in part)
    assert [field.name for field in dataclasses.fields(kind) if not re.search(rf"\b{field.name}\b", entry)] == []


@pytest.mark.parametrize(
    "kind",
    (core.Balance, core.MMoE, core.CGC, core.PLE, core.SMES, core.HoME, core.STAR, core.RankMixer),
    ids=lambda kind: kind.__name__,
)
def test_every_option_of_balance_and_of_multi_gate_layers_is_in_their_pages(kind):
    page = ROUTERS["balance.md" if kind is core.Balance else "multi_gate.md"]
    names = {field.name for field in dataclasses.fields(kind)} - {"init_scale", "balance", "backend"}
    assert [name for name in names if not re.search(rf"\b{name}\b", page)] == []


def test_every_finding_of_the_doctor_has_a_row():
    assert set(REMEDIES) == set(re.findall(r"^\| `(\w+)` \|", ROUTERS["findings.md"], flags=re.MULTILINE))


FEW = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "2"]
FEW += ["--trainer.accelerator", "cpu"]
FIT = "moesaic fit --config configs/vision/digits.yaml"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with which many pages begin."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("digits"))
        patch.setattr(html, "script", lambda: "")
        assert main([*FIT.split()[1:], *FEW]) == 0
        return Path("runs/digits").resolve()


@pytest.mark.pages
@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else []) for page in HOW_TO]
)
def test_the_blocks_of_a_how_to_run(page, digits, tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "how_to" / f"{page}.md").read_text(encoding="utf-8")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    for name, source in re.findall(r"`(\w+\.yaml)`:\n\n```yaml\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
        Path(name).write_text(source)
    short = {
        "fit": FEW,
        "test": FEW[-2:],
        "compare": [*FEW, "--seeds", "1", "--rounds", "0", "--learning_rates", "0.004"],
    }
    monkeypatch.setattr(html, "script", lambda: "")
    for block in blocks(text, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if line == FIT:
                shutil.copytree(digits, "runs/digits")
                continue
            _, command, *rest = shlex.split(line)
            run_dir = ["--run_dir", "runs/digits"] if command == "fit" and "--run_dir" not in rest else []
            if command == "compare" and "--baselines" not in rest:  # tests/apps/compare has the others
                rest += ["--baselines", "dense_equal_flops"]
            # The doctor exits with 1 when it finds something, as it may in so short a training.
            assert main([command, *rest, *run_dir, *short.get(command, [])]) in (0, command == "doctor"), line
    for source in blocks(text, "python"):
        exec(compile(source, f"{page}.md", "exec"), {})


@pytest.mark.parametrize(
    "page", [ROOT / "docs/reference/experts.md", *sorted((ROOT / "docs/reference/routers").glob("*.md"))], ids=page_id
)
def test_the_python_of_a_reference_page_runs(page):
    names: dict[str, object] = {}
    for source in blocks(page.read_text(encoding="utf-8"), "python"):
        exec(compile(source, page.name, "exec"), names)


def write_noise(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(256, size=(20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def test_the_suite_file_of_the_page_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "reference" / "commands" / "compare.md").read_text(encoding="utf-8")
    (written,) = (block for block in blocks(page, "yaml") if "boards:" in block)
    (tmp_path / "ours.yaml").write_text(written)
    (board,) = Suite.read(tmp_path / "ours.yaml").boards
    assert [entry.baseline for entry in board.entries if entry.name.startswith("PLE")][
        1
    ] == "shared_bottom_equal_params"


@pytest.mark.pages
def test_the_page_of_images_runs(tmp_path, monkeypatch, capsys):
    import timm
    from safetensors.torch import save_file

    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 12), ("test", 3)):
        for name in ("cat", "dog"):
            write_noise(Path("photos", split, name), count)
    write_noise(Path("inbox"), 2)
    (tune,) = blocks(VISION, "yaml")
    model = re.search(r"pretrained: (\S+)", tune)[1]
    # The name is one of timm's; its weights come from a hub, for which a file with the same tensors stands here.
    assert model in timm.list_pretrained("vit_tiny*")
    save_file(timm.create_model(model, pretrained=False).state_dict(), "vit_tiny.safetensors")
    Path("tune.yaml").write_text(
        tune.replace(model, "vit_tiny.safetensors").replace("image_size: 128", "image_size: 32")
    )

    commands = [line for block in blocks(VISION, "sh") for line in block.splitlines()]
    assert len(commands) == 5
    for command in ["moesaic fit --config configs/vision/digits.yaml --run_dir runs/digits", *commands]:
        words = shlex.split(command)[1:]
        run_dir = "digits" if "digits" in command else "tune" if "tune" in command else "photos"
        overlay = ["--config", "configs/debug.yaml", "--run_dir", f"runs/{run_dir}", "--trainer.accelerator", "cpu"]
        assert main([*words, *overlay]) == 0, command
    log = capsys.readouterr().err
    assert "142 loaded; 2 of another shape" in log
    assert "6 of MoE layers in place of an FFN, left untrained (blocks.9.mlp." in log

    shutil.copy("inbox/0.png", "a.png")
    shutil.copy("inbox/1.png", "b.png")
    (source,) = blocks(VISION, "python")
    exec(compile(source, "vision.md", "exec"), {})
    assert "path='b.png', class_name='" in capsys.readouterr().out


@pytest.mark.pages
def test_the_page_of_scripts_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # a path that begins with configs/ is found beside the packages
    (source,) = blocks((ROOT / "docs" / "scripts.md").read_text(encoding="utf-8"), "python")
    made: dict[str, object] = {}
    exec(compile(source.replace('"trainer.max_epochs": 2', '"trainer.max_epochs": 1'), "scripts.md", "exec"), made)
    assert (tmp_path / "runs" / "digits" / "report.html").exists()
    assert made["tested"].run_dir == made["fitted"].run_dir


def test_the_page_of_your_model_runs(capsys):
    page = (ROOT / "docs" / "your_model.md").read_text(encoding="utf-8")
    exec(compile("\n".join(blocks(page, "python")), "your_model.md", "exec"), {})
    assert capsys.readouterr().out.startswith("4 of 4 feed-forward networks are sparse\n")


@pytest.mark.slow
def test_the_lightning_module_of_ones_own_is_trained_tested_and_compared(tmp_path, monkeypatch, capsys):
    page = (
        (ROOT / "docs" / "your_model.md").read_text(encoding="utf-8").partition("## A LightningModule of your own")[2]
    ).partition("\n## ")[0]
    (source,), (config,) = blocks(page, "python"), blocks(page, "yaml")
    assert source.count("\n") <= 80
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])  # the commands find the module by themselves
    Path("my_model.py").write_text(source)
    Path("my_model.yaml").write_text(config)
    few = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.accelerator", "cpu"]
    commands = [shlex.split(line) for block in blocks(page, "sh") for line in block.splitlines()]
    assert [words[1] for words in commands] == ["fit", "test", "compare", "doctor", "export", *["convert"] * 3, "fit"]
    for _, command, *rest in commands:
        alone = ["--seeds", "1", "--rounds", "0", "--learning_rates", "0.003"] if command == "compare" else []
        few = few if command in ("fit", "test", "compare") else []
        assert main([command, *rest, *few, *alone]) in (
            0,
            command == "doctor",
        )  # which exits with 1 where it finds much
    (script,), made = blocks(page, "text"), {}
    exec(compile(script, "your_model.md", "exec"), made)
    adapted = [name for name, module in made["model"].named_modules() if isinstance(module, core.AdaptedLinear)]
    assert adapted == ["head"]
    shown = capsys.readouterr().out
    assert "blocks.0: 4 FFN" in shown
    assert "2 of 2 feed-forward networks are sparse" in shown
    assert "Against dense, equal FLOPs" in shown
