"""Every configuration in ``configs/`` is read by the command line and built; its header says how to run it."""

from __future__ import annotations

import itertools
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from grids import one_in
from made_boards import make_tables
from PIL import Image

import core
from apps.cli import configs
from apps.cli.errors import UsageError
from apps.cli.sections import Sections
from apps.cli.train import build, quiet
from apps.compare.experiment import Experiment, arguments
from apps.compare.ladder.growth import Growth
from apps.compare.options import Command
from apps.compare.suite.command import experiment_of
from apps.compare.suite.file import Suite
from apps.compare.systems import SPARSE, candidates
from apps.data import datasets
from apps.data.subwords import SubwordConfig, train_subwords
from apps.equal_cost import routers
from apps.multimodal.data import ImageTextData
from apps.nlp.language.data import TextData
from apps.nlp.text_to_text.data import TextToTextData
from apps.nlp.translation.data import TranslationData
from apps.recsys.encoding.features import CategoricalFeature, ContinuousFeature, Features
from apps.recsys.retrieval.data import RetrievalData
from apps.recsys.sequence.data import HistoryData
from apps.recsys.tables.data import TableData
from apps.train.device import device_options

ROOT = Path(__file__).parents[1]
TABLES = ROOT / "configs" / "suites" / "tables.yaml"  # its configurations are written from tables
SUITES = sorted({*(ROOT / "configs" / "suites").glob("*.yaml")} - {TABLES})
HUB = sorted((ROOT / "configs" / "hub").glob("*.yaml"))  # need a folder of transformers: tests/peers has one
FILES = sorted(set((ROOT / "configs").rglob("*.yaml")) - {TABLES, *SUITES, *HUB})
ROUTING = sorted((ROOT / "configs" / "routing").glob("*.yaml"))
OTHERS = [p for p in FILES if p not in ROUTING]
OVERLAYS = [p for p in OTHERS if "class_path" not in (yaml.safe_load(p.read_text()).get("model") or {})]
WHOLE = [p for p in OTHERS if p not in OVERLAYS]
BASE = ROOT / "configs" / "vision" / "digits.yaml"
DEEP_BASE = BASE.with_stem("digits_vmoe")  # for overlays with options of several blocks
TEXT_BASE = ROOT / "configs" / "nlp" / "text_mixtral_like.yaml"  # for overlays with options of a text model
TABLE_BASE = ROOT / "configs" / "recsys" / "synthetic.yaml"  # for overlays with options of a recommender
PAIR_BASE = ROOT / "configs" / "multimodal" / "shapes.yaml"  # for overlays with options of images and texts
SPECIAL_BASES = {
    "share_experts:": DEEP_BASE,
    "depths:": DEEP_BASE,
    "      - num": DEEP_BASE,
    "embedding:": TABLE_BASE,
    "attention_moe:": TEXT_BASE,
    "num_modalities:": PAIR_BASE,
}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs"))


def base_of(overlay: Path) -> Path:
    """Return the configuration that an overlay is laid over here."""
    return next((base for word, base in SPECIAL_BASES.items() if word in overlay.read_text()), BASE)


def image_folder(root: Path) -> Path:
    """Write images in place of data that only the user can bring."""
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (8, 8), (i, 0, 0)).save(root / split / label / f"{i}.png")
    return root


def no_data(monkeypatch) -> None:
    """Give the data modules what a model asks of tables and texts, which a test may not fetch."""
    made = Features(
        categorical=(
            *(CategoricalFeature(name, 5) for name in ("user_id", "item_id")),
            CategoricalFeature("tags", 7, multi_valued=True),
        ),
        continuous=(ContinuousFeature("age", mean=40.0, std=10.0, quantiles=(20.0, 30.0, 50.0)),),
        tasks=("like", "watched_next"),
        positives=(0.5, 0.2),
    )
    with_domains = property(lambda data: replace(made, num_domains=0 if data.domain is None else 3))
    monkeypatch.setattr(TableData, "features", with_domains)
    monkeypatch.setattr(HistoryData, "num_items", 50)
    for name, value in (("user_features", made), ("item_features", made), ("num_items", 200)):
        monkeypatch.setattr(RetrievalData, name, value)
    subwords = train_subwords(["a dog runs"], ["ein Hund läuft"], SubwordConfig(vocab_size=300))
    monkeypatch.setattr(TranslationData, "subwords", subwords)
    monkeypatch.setattr(TextData, "subwords", subwords)
    monkeypatch.setattr(TextToTextData, "subwords", subwords)
    monkeypatch.setattr(TextToTextData, "tasks", ("summary",))
    for name, value in (("vocab_size", 300), ("max_tokens", 32), ("attributes", {"colour": 3, "shape": 2})):
        monkeypatch.setattr(ImageTextData, name, value)


def one_a_model() -> list[Any]:
    """Return the configurations, with ``slow`` on all but the first of each model."""
    first: dict[str, Path] = {}
    for path in WHOLE:
        first.setdefault(yaml.safe_load(path.read_text())["model"]["class_path"], path)
    return [pytest.param(path, marks=[] if path in first.values() else [pytest.mark.slow]) for path in WHOLE]


def parse(*paths: Path) -> None:
    """Read a configuration and its overlays, whose classes of the apps have short names."""
    tree: dict[str, Any] = {}
    for path in paths:
        tree = configs.merge(tree, configs.read_config(path))
    tree = {key: tree[key] for key in ("model", "data", "trainer") if key in tree}
    Sections(tree)


@pytest.mark.parametrize("path", WHOLE, ids=name)
def test_a_configuration_is_parsed(path):
    parse(path)


@pytest.mark.parametrize("path", [*OVERLAYS, *ROUTING], ids=name)
def test_an_overlay_is_parsed_over_a_configuration(path):
    parse(base_of(path), path)


def test_a_wrong_value_in_a_configuration_is_found(tmp_path):
    path, top_k = tmp_path / "wrong.yaml", "model: {init_args: {moe: {router: {init_args: {top_k: two}}}}}"
    for line, named in ((top_k, "top_k"), ("trainer: {max_epoch: 1}", "max_epoch")):
        path.write_text(line)
        with pytest.raises(UsageError, match=named):
            parse(BASE, path)


@pytest.mark.parametrize("path", one_a_model(), ids=name)
def test_a_configuration_builds(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    no_data(monkeypatch)
    flags = []
    dataset = yaml.safe_load(path.read_text())["data"]["init_args"].get("dataset")
    if dataset is not None and datasets.find(dataset).app == "vision" and not datasets.find(dataset).sources:
        flags += ["--data.root", str(image_folder(tmp_path / "data"))]
    with quiet():
        cli = build("fit", ["--config", str(path), *flags])
    assert cli.run_dir == Path("runs") / path.stem
    assert sum(p.numel() for p in cli.model.parameters()) > 0
    for part in ("router", "expert"):  # an option that is not written has the default of the named class
        written = ((yaml.safe_load(path.read_text())["model"]["init_args"].get("moe") or {}).get(part)) or {}
        if "class_path" in written:
            expected = getattr(core, written["class_path"].removeprefix("core."))(**written.get("init_args", {}))
            assert getattr(cli.model.moe, part) == expected
    if grows := yaml.safe_load(path.read_text()).get("ladder"):  # each option that grows is a number
        options = Growth.of(grows, (0.25,), path.stem).options(cli.plain_config(), 0.25, 0)
        assert {"learning_rate", *options} == {"learning_rate", *grows}
    assert cli.trainer.max_epochs or cli.trainer.max_steps > 0
    named = yaml.safe_load(path.read_text())["trainer"]
    assert not {"accelerator", "devices"} & named.keys()  # they are the user's
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    asked = {**cli.made["trainer"], **device_options(cli.made["trainer"])}
    wanted = ("cuda", 1, named.get("precision", "bf16-mixed"))
    assert (asked["accelerator"], asked["devices"], asked["precision"]) == wanted


@pytest.mark.parametrize("path", one_in(8, OVERLAYS, name), ids=name)
def test_an_overlay_builds_over_a_configuration(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    base = base_of(path)
    if base in (TEXT_BASE, PAIR_BASE):
        no_data(monkeypatch)
    with quiet():
        cli = build("fit", ["--config", str(base), "--config", str(path)])
    assert cli.run_dir == Path("runs") / f"{base.stem}-{path.stem}"


@pytest.fixture(scope="module")
def base_moe(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, quiet():
        patch.chdir(tmp_path_factory.mktemp("base"))
        return build("fit", ["--config", str(BASE)]).model.moe


@pytest.mark.slow  # each is built from its parts in tests/apps/vision/test_routers.py
@pytest.mark.parametrize("path", ROUTING, ids=name)
def test_a_routing_overlay_means_the_same_to_every_command(path, monkeypatch, tmp_path, base_moe):
    # The command line keeps values of the router before that the new one has too; compare and bench do not.
    monkeypatch.chdir(tmp_path)
    with quiet():
        cli = build("fit", ["--config", str(BASE), "--config", str(path)])
    assert cli.model.moe == routers.with_router(base_moe, path.stem)


def rows_of_suites() -> dict[tuple[tuple[str, ...], tuple[str, ...]], set[str]]:
    """Return the baselines of each row of a suite, by its files and options."""
    rows: dict[tuple[tuple[str, ...], tuple[str, ...]], set[str]] = {}
    for entry in (entry for path in SUITES for board in Suite.read(path).boards for entry in board.entries):
        rows.setdefault((entry.files, entry.rest), set()).update({entry.baseline} - {None})
    return rows


ROWS = rows_of_suites()


@pytest.mark.parametrize("row", one_in(3, ROWS, str), ids=lambda row: " ".join(itertools.chain(*row)))
def test_a_row_of_a_suite_is_read_and_built(row, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    no_data(monkeypatch)
    with quiet():
        model = experiment_of(*row).module(SPARSE)
    assert ROWS[row] <= set(candidates(model))


def test_the_rows_of_the_suite_of_tables_are_built_from_their_tables(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    make_tables(TABLES, tmp_path)
    first, *others = Suite.read(TABLES).boards
    assert len(others) == 12
    with quiet():
        sparse, members, before = (experiment_of(e.files, e.rest).module(SPARSE) for e in first.entries[:3])
    assert set(first.baselines) <= set(candidates(sparse))
    assert [model.num_members for model in (sparse, members, before)] == [1, 8, 1]
    assert before.shared_config.expert.hidden_dims == (64,)


def header(path: Path) -> list[str]:
    """Return the lines of the comment that a configuration begins with, without their marks."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    return [line.removeprefix("#").strip() for line in lines]


def commands(path: Path) -> list[list[str]]:
    """Return the words of each command of a header; options within its sentences follow the first command."""
    text = "\n".join(header(path)).replace("\\\n", " ")
    lines = [line for line in text.split("\n") if line.startswith(("moesaic ", "torchrun "))]
    typed = [shlex.split(line, comments=True) for line in lines]
    for words in typed:
        words[:] = words[words.index("apps.cli") if "apps.cli" in words else 0 :][1:]  # the command, and its arguments
    prose = " ".join(line for line in text.split("\n") if line not in lines)
    sentences = re.findall(r"(?:--[a-z_]+(?:\.[a-z_]+)+ (?:'[^']*'|[^\s']+) ?(?:and )?)+", prose)
    options = [[word.rstrip(".,;:)") for word in shlex.split(sentence) if word != "and"] for sentence in sentences]
    return typed + [[*typed[0], *words] for words in options]


def build_of(words: list[str]) -> tuple[str, ...]:
    """Return what a command builds: a test or prediction builds what its training does, wherever the files lie."""
    command, *rest = words
    for option in {"--ckpt_path", "--weights"} & {*rest}:
        del rest[rest.index(option) : rest.index(option) + 2]
    if "--data.root DIR" in " ".join(rest):
        del rest[rest.index("--data.root") : rest.index("--data.root") + 2]
    return ("fit" if command in ("test", "validate", "predict") else command, *rest)


def built_above() -> set[tuple[str, ...]]:
    """Return what the other tests build: configurations alone, overlays over their bases, and rows of suites."""
    configs = {path: ("--config", str(path.relative_to(ROOT))) for path in FILES}
    built = {("fit", *configs[path]) for path in WHOLE}
    built |= {("fit", *configs[base_of(path)], *configs[path]) for path in OVERLAYS}
    built |= {("fit", *configs[BASE], *configs[path]) for path in ROUTING}
    return built | {("compare", *files, *rest) for files, rest in ROWS}


def commands_to_build() -> list[tuple[Path, list[str]]]:
    """Return the commands of the headers, without those that build what has been built."""
    built, chosen = built_above(), []
    for path in FILES:
        for words in commands(path):
            if build_of(words) not in built:
                built.add(build_of(words))
                chosen.append((path, words))
    return chosen


COMMANDS = commands_to_build()


def words_of(typed: tuple[Path, list[str]]) -> str:
    return " ".join(typed[1])


@pytest.mark.parametrize("path", FILES, ids=name)
def test_the_header_says_how_to_run_it(path):
    typed = commands(path)
    assert any(words[0] == "fit" and str(path.relative_to(ROOT)) in words for words in typed), "no `moesaic fit` line"


def test_a_header_s_commands_are_found(tmp_path):
    path = tmp_path / "a.yaml"
    # A continued line, a comment behind a command, and options within a sentence, of which a stop is no part.
    path.write_text(
        "# A thing.\n#   moesaic fit --config a.yaml \\\n#     --x.y 1   # so\n# For --data.n 'a b' and --m.k 2, it\n"
        "# goes: --data.root DIR.\nmodel: {}\n# moesaic fit --no\n"
    )
    fit = ["fit", "--config", "a.yaml", "--x.y", "1"]
    assert commands(path) == [fit, [*fit, "--data.n", "a b", "--m.k", "2"], [*fit, "--data.root", "DIR"]]


# Each configuration and overlay of these has been built above by itself; one in ten is built as it is typed.
@pytest.mark.parametrize("typed", one_in(10, COMMANDS, words_of), ids=words_of)
def test_what_a_header_says_to_type_is_read_and_built(typed, monkeypatch, tmp_path):
    path, words = typed
    if any("TorchRecStrategy" in (ROOT / word).read_text() for word in words if word.endswith(".yaml")):
        pytest.importorskip("torchrec")
    monkeypatch.chdir(tmp_path)
    no_data(monkeypatch)
    command, *rest = (str(ROOT / word) if word.startswith("configs/") else word for word in words)
    for option in {"--ckpt_path", "--weights"} & {*rest}:
        del rest[rest.index(option) : rest.index(option) + 2]
    if command != "compare" and "--config" not in rest:  # that of the run
        rest += ["--config", str(path)]
    if "DIR" in rest:
        rest[rest.index("DIR")] = str(image_folder(tmp_path / "data"))
    if "INBOX" in rest:
        rest[rest.index("INBOX")] = str(image_folder(tmp_path / "inbox"))
        rest += ["--data.root", str(tmp_path / "inbox")]  # an untrained model learns its classes from there
    if command == "compare":
        asked = Command.read(rest)
        experiment = Experiment(arguments(str(asked.config), [*map(str, asked.overlays)], asked.rest, asked.routers))
        known = candidates(experiment.module(SPARSE), asked.routers)
        assert set(asked.baselines or ()) <= set(known)
        return
    rest += ["--trainer.devices", "1"]  # one process, whatever the command asks for
    rest += [] if command == "fit" else ["--ckpt_path", "none"]  # nothing is trained here
    with quiet():
        cli = build(command, rest)
    assert sum(p.numel() for p in cli.model.parameters()) > 0
