"""The worked examples, on small networks: those of ``core.sparsify`` begin as they were, and learn."""

from __future__ import annotations

import re

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from examples import graph_network, pictures_for_recommenders, timm_vit


def figures(printed: str) -> dict[str, tuple[float, float]]:
    """Return the change at step 0 and the accuracy in percent of each model that an example printed."""
    rows = re.findall(r"^(\w+): changed by (\S+) at step 0; accuracy (\S+) % at step", printed, flags=re.MULTILINE)
    return {name: (float(change), float(accuracy)) for name, change, accuracy in rows}


def check_begins_and_learns(printed: str, above: float) -> None:
    """Check that each model began with the dense one's outputs, and that its accuracy is above a percentage."""
    rows = figures(printed)
    assert list(rows) == ["sparse", "twin", "dense"]
    for change, accuracy in rows.values():
        assert change < 1e-6
        assert accuracy > above
    assert rows["sparse"][0] > 0  # products in another order: the experts were used
    assert "sparse minus twin: " in printed


def test_a_graph_network(capsys):
    assert graph_network.main(["--steps", "20"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("2 of 2 feed-forward networks are sparse")
    check_begins_and_learns(printed, above=60.0)  # chance is 10


def test_a_vit_of_timm_that_is_trained_first(capsys):
    assert timm_vit.main(["--steps", "12", "--size", "32"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("6 of 6 feed-forward networks are sparse")
    check_begins_and_learns(printed, above=15.0)  # chance is 10


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
    check_begins_and_learns(capsys.readouterr().out, above=60.0)  # chance is 50


def test_a_sentence_encoder(capsys):
    pytest.importorskip("transformers")
    from examples import minilm_titles

    assert minilm_titles.main(["--steps", "20"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("2 of 2 feed-forward networks are sparse")
    check_begins_and_learns(printed, above=99.0)  # both of the titles held out


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
