"""A word or a path stands for a checkpoint."""

from __future__ import annotations

import pytest

from apps.base.files import read_json
from apps.train.checkpoint.paths import find_checkpoint, is_hub_folder, is_sharded, named_checkpoint, run_name
from apps.train.publish.exported import Description


@pytest.fixture
def run(tmp_path):
    """A run's folder with a best and a last checkpoint, the last one of shards."""
    (tmp_path / "checkpoints" / "last.ckpt").mkdir(parents=True)
    (tmp_path / "checkpoints" / "last.ckpt" / "checkpoint.pt").touch()
    (tmp_path / "checkpoints" / "best.ckpt").touch()
    return tmp_path


def test_a_run_s_folder_means_its_average_else_its_best_checkpoint_else_its_last(run):
    average, best, last = (run / "checkpoints" / f"{name}.ckpt" for name in ("average", "best", "last"))
    average.touch()
    assert find_checkpoint(run) == find_checkpoint(run / "checkpoints") == named_checkpoint(str(run), run) == average
    average.unlink()
    assert find_checkpoint(run) == find_checkpoint(run / "checkpoints") == find_checkpoint(best) == best
    best.unlink()
    assert is_sharded(last)
    assert find_checkpoint(run) == find_checkpoint(str(last)) == last


def test_a_word_means_one_of_a_run_and_anything_else_is_a_path(run, tmp_path):
    other = tmp_path / "other"
    assert named_checkpoint("last", run) == run / "checkpoints" / "last.ckpt"
    assert named_checkpoint(str(run), other) == run / "checkpoints" / "best.ckpt"
    with pytest.raises(FileNotFoundError, match=r"^no checkpoint .*other/checkpoints/best\.ckpt$"):
        named_checkpoint("best", other)


def test_what_is_not_there_is_named(run):
    with pytest.raises(FileNotFoundError, match=r"^no checkpoint nope\.ckpt$"):
        find_checkpoint("nope.ckpt")
    with pytest.raises(FileNotFoundError, match=r"^no checkpoint .*average\.ckpt$"):
        named_checkpoint("average", run)
    (run / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds no checkpoint: a run has checkpoints/best\.ckpt or"):
        find_checkpoint(run / "empty")


def test_the_name_of_an_earlier_run_has_that_of_the_run_before_it(tmp_path):
    checkpoint = tmp_path / "digits" / "checkpoints" / "best.ckpt"
    assert run_name(checkpoint) == "digits"
    assert run_name(tmp_path / "digits" / "earlier" / "2" / "checkpoints" / "best.ckpt") == "digits/earlier/2"


def test_json_that_is_nested_too_deeply_is_no_description_of_a_model(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("[" * 100_000)
    assert not is_hub_folder(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json is not a JSON file"):
        read_json(path)
    with pytest.raises(ValueError, match=r"config\.json is not a model that moesaic export has written"):
        Description.from_json(path.read_text(), path)
