"""Models of every app in pretrained folders, and on a hub that is a folder here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from converted import DIGITS, IMAGES, MOE, classifier, write_run
from places import environment
from shown_runs import RUNS
from tiny_app import TinyModule
from torch import Tensor

import apps
from apps.train.cost.quantizing import form_of, quantize_model
from apps.train.step.adapted import adapt_linears
from apps.train.step.module import SparseModule
from apps.vision.module import VisionClassifier


def same(a: Any, b: Any) -> bool:
    """Whether nested values are of the same types, and equal bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and list(a) == list(b) and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("name", RUNS)
def test_a_model_of_every_app_returns_bit_for_bit(tmp_path, name):
    model = apps.load(RUNS[name](tmp_path))
    model.save_pretrained(tmp_path / "folder")
    again = apps.load(tmp_path / "folder")
    assert type(again) is type(model)
    assert not again.training
    assert again.hparams == model.hparams
    assert same(dict(again.state_dict()), dict(model.state_dict()))
    assert same(again.encoding_state, model.encoding_state)
    card = (tmp_path / "folder" / "README.md").read_text()
    assert f"`{type(model).__name__}` of moesaic" in card
    assert type(model).model_kind.title[1:] in card


@pytest.fixture
def digits(tmp_path):
    return apps.load(RUNS["digits"](tmp_path / "run"))


@pytest.mark.slow  # it imports torch and Lightning anew
def test_the_three_lines_of_the_card_predict_in_a_fresh_process(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digits.save_pretrained(tmp_path / "folder")
    from PIL import Image

    Image.new("L", (8, 8), 200).save(tmp_path / "image.png")
    lines = (tmp_path / "folder" / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    script = lines.replace("PATH OF THIS FOLDER", "folder").replace("model.predict", "print(model.predict") + ")"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(digits.predict(["image.png"]))


def test_from_pretrained_takes_a_folder_and_refuses_one_of_another_model_by_name(digits, tmp_path):
    digits.save_pretrained(tmp_path / "folder")
    for kind in (SparseModule, VisionClassifier):
        assert torch.equal(kind.from_pretrained(tmp_path / "folder")(IMAGES), digits(IMAGES))
    with pytest.raises(
        ValueError, match="folder holds a model of class VisionClassifier, and TinyModule was asked for"
    ):
        TinyModule.from_pretrained(tmp_path / "folder")
    with pytest.raises(ValueError, match=r"run is no folder of save_pretrained: it has no config\.json"):
        VisionClassifier.from_pretrained(tmp_path / "run")
    with pytest.raises(TypeError):
        VisionClassifier.from_pretrained("owner/name", no_option=True)
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    config["model"]["module_class"] = "os.system"
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"holds a model of class os\.system, which no app has and nothing has imported"
    ):
        apps.load(tmp_path / "folder")


def test_an_adapted_model_returns_with_its_updates(digits, tmp_path):
    from core.config.plain import to_plain

    updates = to_plain(MOE, type(MOE)) | {"expert": {"class_path": "core.LoRA", "init_args": {"rank": 2}}}
    adapt_linears(digits, {"adapted": {"moe": updates, "modules": ["model.blocks.0.attn.qkv"]}})
    digits.save_pretrained(tmp_path / "folder")
    again = apps.load(tmp_path / "folder")
    assert same(dict(again.state_dict()), dict(digits.state_dict()))
    assert any("lora" in name or "experts" in name for name in again.state_dict() if "blocks.0" in name)


@pytest.mark.parametrize("form", ["int8", "int4:4"])
def test_a_quantized_model_returns_as_it_was(digits, tmp_path, form):
    quantize_model(digits, form)
    digits.save_pretrained(tmp_path / "folder")
    again = apps.load(tmp_path / "folder")
    assert form_of(again) == form
    assert same(dict(again.state_dict()), dict(digits.state_dict()))
    assert torch.equal(again(IMAGES), digits(IMAGES))
    assert f"`--quantize {form}`" in (tmp_path / "folder" / "README.md").read_text()


class Hub:
    """Stands for the hub: repositories are folders."""

    root: Path

    def __init__(self, token: str | None = None) -> None:
        pass

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> Any:
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        return type("Repository", (), {"repo_id": repo_id})

    def upload_folder(self, repo_id: str, folder_path: Path, **options: Any) -> str:
        for path in folder_path.iterdir():
            path.rename(self.root / repo_id / path.name)
        return f"https://hub/{repo_id}/commit/1"


def test_a_model_goes_to_a_hub_and_comes_back(digits, tmp_path, monkeypatch):
    Hub.root = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: Hub.root / name)
    assert digits.push_to_hub("owner/digits") == "https://hub/owner/digits/commit/1"
    assert (Hub.root / "owner" / "digits" / "README.md").read_text().partition("# ")[2].startswith("digits\n")
    again = VisionClassifier.from_pretrained("owner/digits")
    assert torch.equal(again(IMAGES), digits(IMAGES))
    pushed = digits.save_pretrained(tmp_path / "folder", push_to_hub=True, repo_id="owner/other")
    assert pushed == "https://hub/owner/other/commit/1"


def test_a_repository_that_cannot_be_fetched_is_one_line(monkeypatch):
    def offline(name, **options):
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match=r"^'owner/name' is no folder here, and cannot be fetched: no network$"):
        SparseModule.from_pretrained("owner/name")


# ---- the card


def test_the_card_has_the_figures_of_a_test_of_these_weights_alone(digits, tmp_path):
    run = tmp_path / "run"
    figures = {"test/top1": 0.875, "test/loss": 0.5, "test/routing/model.blocks.1.mlp/dead_experts": 1.0}
    about = {"command": "moesaic test | more", "device": "a processor", "torch": "2.13", "packages": {"timm": "1.0"}}
    written = {"checkpoint": "elsewhere/best.ckpt", **figures, "measured": about}
    (run / "test.json").write_text(json.dumps(written))
    digits.save_pretrained(tmp_path / "one")
    card = (tmp_path / "one" / "README.md").read_text()
    for line in (
        "- `model.blocks.1.mlp`: 4 experts, 2 a token, `TokenChoice`",
        "| top1 | 0.875 |",
        "| model.blocks.1.mlp | 1 |",
        "| data | digits (VisionData) |",
        "| command | moesaic test \\| more |",
        "| timm | 1.0 |",
    ):
        assert f"\n{line}\n" in card
    metadata = huggingface_hub.ModelCard(card).data
    (result,) = metadata.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("top1", 0.875, "digits (VisionData)")
    assert metadata.license is None

    again = apps.load(tmp_path / "one")
    again.save_pretrained(tmp_path / "two", run=run)
    assert "| top1 | 0.875 |" in (tmp_path / "two" / "README.md").read_text()
    with torch.no_grad():
        next(digits.parameters()).add_(1)
    digits.save_pretrained(tmp_path / "three")
    card = (tmp_path / "three" / "README.md").read_text()
    assert "0.875" not in card
    assert "No figures: the test in the run's folder is of other weights (best.ckpt)" in card


def test_a_dense_model_is_called_dense(tmp_path):
    write_run(tmp_path / "run", classifier(None), dict(DIGITS))
    apps.load(tmp_path / "run").save_pretrained(tmp_path / "folder")
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "**dense** (no experts)" in card
    assert "mixture-of-experts" not in card
