"""The worked examples, on small networks: those of ``core.sparsify`` begin as they were, and learn."""

from __future__ import annotations

import importlib
import re

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from examples import pictures_for_recommenders, timm_vit


def check_begins_and_learns(printed: str, number: int, above: float) -> None:
    """Check that each model began with the dense one's outputs, and that its accuracy is above a percentage."""
    assert printed.startswith(f"{number} of {number} feed-forward networks are sparse")
    rows = re.findall(r"^(\w+): changed by (\S+) at step 0; accuracy (\S+) % at step", printed, flags=re.MULTILINE)
    assert [name for name, *_ in rows] == ["sparse", "twin", "dense"]
    assert all(float(change) < 1e-6 and float(accuracy) > above for _, change, accuracy in rows)
    assert float(rows[0][1]) > 0  # products in another order: the experts were used
    assert "sparse minus twin: " in printed


@pytest.mark.parametrize(
    ("example", "options", "number", "above"),
    # Chance is 10, and of the titles both that are held out are right.
    [
        ("graph_network", ["--steps", "20"], 2, 60.0),
        ("timm_vit", ["--steps", "12", "--size", "32"], 6, 15.0),
        ("minilm_titles", ["--steps", "20"], 2, 99.0),
    ],
)
def test_an_example_begins_as_the_dense_network_and_learns(example, options, number, above, capsys):
    if example == "minilm_titles":
        pytest.importorskip("transformers")
    assert importlib.import_module(f"examples.{example}").main(options) == 0
    check_begins_and_learns(capsys.readouterr().out, number, above)


def test_a_vit_begins_with_the_weights_of_a_file(tmp_path, capsys):
    torch.manual_seed(0)
    names = ["cat", "dog"]
    for label, name in enumerate(names):  # dark and bright images
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            pixels = torch.randint(100, (16, 16, 3), dtype=torch.uint8) + 150 * label
            Image.fromarray(pixels.numpy()).save(tmp_path / "images" / name / f"{i}.png")
    weights = str(tmp_path / "vit.safetensors")
    save_file(timm.create_model("test_vit", num_classes=7, img_size=32).state_dict(), weights)
    options = ["--weights", weights, "--images", str(tmp_path / "images"), "--size", "32", "--steps", "8"]
    assert timm_vit.main(options) == 0
    check_begins_and_learns(capsys.readouterr().out, 6, above=60.0)  # chance is 50


def test_optuna_searches_and_each_trial_is_a_run(tmp_path):
    pytest.importorskip("optuna")
    from examples import optuna_search

    configs = ["configs/vision/digits.yaml", "configs/debug.yaml"]
    study = optuna_search.main(["--config", *configs, "--trials", "2", "--output", str(tmp_path)])
    for trial in study.trials:
        run = yaml.safe_load((tmp_path / str(trial.number) / "config.yaml").read_text())["model"]["init_args"]
        assert trial.params == {"lr": run["optimizer"]["lr"], "num_experts": run["moe"]["num_experts"]}
        assert 0 <= trial.value <= 1
    assert study.best_value == max(trial.value for trial in study.trials)


@pytest.mark.slow
def test_pictures_tell_a_recommender_which_new_items_are_clicked(capsys):
    assert pictures_for_recommenders.main(["--epochs", "2", "--users", "200"]) == 0
    printed = capsys.readouterr().out
    aucs = {kind: float(auc) for kind, auc in re.findall(r"^(with\w*) vectors: AUC (\S+),", printed, re.MULTILINE)}
    assert aucs["without"] == pytest.approx(0.5, abs=0.05)  # nothing else tells new items apart
    assert aucs["with"] > 0.6
    low = re.search(r"^with minus without: (\S+) to", printed, re.MULTILINE)
    assert low is not None
    assert float(low[1]) > 0.05
