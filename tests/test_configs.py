"""Every configuration in ``configs/`` is read by the command line and built; its header says how to run it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from PIL import Image

from apps import routers, sources
from apps.cli.train import build, quiet
from apps.nlp.data import TranslationData
from apps.nlp.subwords import SubwordConfig, train_subwords
from apps.nlp.text import TextData
from apps.recsys.data import TableData
from apps.recsys.features import CategoricalFeature, ContinuousFeature, Features
from apps.recsys.sequence.data import HistoryData

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
ROUTING = sorted((ROOT / "configs" / "routing").glob("*.yaml"))
OTHERS = [p for p in FILES if p not in ROUTING]
OVERLAYS = [p for p in OTHERS if "class_path" not in (yaml.safe_load(p.read_text()).get("model") or {})]
WHOLE = [p for p in OTHERS if p not in OVERLAYS]
BASE = ROOT / "configs" / "vision" / "digits.yaml"
TABLE_BASE = ROOT / "configs" / "recsys" / "synthetic.yaml"  # of overlays with options of a recommender


def name(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs"))


def image_folder(root: Path) -> Path:
    """Stands for data that only the user can bring."""
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (8, 8), (i, 0, 0)).save(root / split / label / f"{i}.png")
    return root


def no_data(monkeypatch) -> None:
    """Stands for tables and texts that a test may not fetch: what a model asks of them."""
    made = Features(
        categorical=(CategoricalFeature("city", 5), CategoricalFeature("tags", 7, multi_valued=True)),
        continuous=(ContinuousFeature("age", mean=40.0, std=10.0, quantiles=(20.0, 30.0, 50.0)),),
        tasks=("like", "watched_next"),
        positives=(0.5, 0.2),
    )
    monkeypatch.setattr(TableData, "features", made)
    monkeypatch.setattr(HistoryData, "num_items", 50)
    subwords = train_subwords(["a dog runs"], ["ein Hund läuft"], SubwordConfig(vocab_size=300))
    monkeypatch.setattr(TranslationData, "subwords", subwords)
    monkeypatch.setattr(TextData, "subwords", subwords)


@pytest.mark.parametrize("path", WHOLE, ids=name)
def test_a_configuration_builds(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    no_data(monkeypatch)
    flags = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.precision", "32-true"]
    dataset = yaml.safe_load(path.read_text())["data"]["init_args"].get("dataset")
    if dataset is not None and sources.find(dataset).app == "vision" and not sources.find(dataset).sources:
        flags += ["--data.root", str(image_folder(tmp_path / "data"))]
    with quiet():
        cli = build("fit", ["--config", str(path), *flags])
    assert cli.run_dir == Path("runs") / path.stem
    assert sum(p.numel() for p in cli.model.parameters()) > 0
    assert cli.trainer.max_epochs or cli.trainer.max_steps > 0


@pytest.mark.parametrize("path", OVERLAYS, ids=name)
def test_an_overlay_builds_over_a_configuration(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    base = TABLE_BASE if "embedding:" in path.read_text() else BASE
    with quiet():
        cli = build("fit", ["--config", str(base), "--config", str(path)])
    assert cli.run_dir == Path("runs") / f"{base.stem}-{path.stem}"


@pytest.fixture(scope="module")
def base_moe(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, quiet():
        patch.chdir(tmp_path_factory.mktemp("base"))
        return build("fit", ["--config", str(BASE)]).model.moe


@pytest.mark.parametrize("path", ROUTING, ids=name)
def test_a_routing_overlay_means_the_same_to_every_command(path, monkeypatch, tmp_path, base_moe):
    # The command line keeps values of the router before that the new one has too; compare and bench do not.
    monkeypatch.chdir(tmp_path)
    with quiet():
        cli = build("fit", ["--config", str(BASE), "--config", str(path)])
    assert cli.model.moe == routers.with_router(base_moe, path.stem)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_the_header_says_how_to_run_it(path):
    lines = path.read_text().splitlines()
    header = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    assert any("moesaic fit" in line and path.name in line for line in header), "no `moesaic fit --config ...` line"
