"""``moesaic predict`` of images and texts: searches, and the vectors of pairs, folders and texts; ``apps.load``."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from tinted import write_tinted
from torch.testing import assert_close

import apps
from apps.cli import main

CONFIG = """
model:
  class_path: ImageTextRetriever
  init_args:
    tower: {class_path: SingleTower, init_args: {width: 16, depth: 1, num_heads: 2, patch_size: 16}}
    dim: 8
    moe: {num_experts: 2, router: {class_path: TokenChoice, init_args: {top_k: 1}},
          expert: {class_path: FFN, init_args: {hidden_dim: 16}}}
    moe_blocks: all
data: {class_path: ImageTextData, init_args: {dataset: shapes, subset: 64, batch_size: 32, attributes: []}}
trainer: {accelerator: cpu, max_epochs: 1, enable_progress_bar: false, limit_val_batches: 1}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of a small model, ``run``, and images, ``shop``."""
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "pairs.yaml").write_text(CONFIG)
    write_tinted(folder / "shop", "a/red.png", "green.png", "blue.png", size=40)
    (folder / "shop" / "bad.png").write_text("no image")
    argv = ["--config", str(folder / "pairs.yaml"), "--run_dir", str(folder / "run")]
    assert main(["fit", *argv, "--data.cache_dir", str(folder / "cache")]) == 0
    return folder


@pytest.fixture
def predict(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> list[str]:
    monkeypatch.chdir(trained)
    capsys.readouterr()
    return ["predict", "--ckpt_path", "run/checkpoints/best.ckpt", "--data.cache_dir", "cache"]


def test_a_search_prints_the_best_files_and_keeps_rows_and_a_page(predict, capsys):
    argv = [*predict, "--data.images", "shop", "--data.top", "2", "--data.query", "- red: large"]  # it is no YAML
    assert main(argv) == 0
    shown = capsys.readouterr()
    lines = [line.split("\t") for line in shown.out.splitlines()]
    assert len(lines) == 2
    for part in ("left out: shop/bad.png is corrupt: it is no image", "1 prediction in", "page: run/search.html"):
        assert part in shown.err
    row = json.loads(Path("run/search.jsonl").read_text())
    assert row["query"] == "- red: large"
    assert [[f"{score:.4f}", path] for score, path in zip(row["score"], row["path"], strict=True)] == lines
    assert Path("run/search.html").read_text().count("<img ") == 2
    assert main(argv) == 0  # the second replaces them
    assert capsys.readouterr().out == shown.out
    (index,) = Path("cache/image_vectors").glob("*.safetensors")
    assert len(index.read_bytes()) < 2000


def test_a_search_writes_the_file_that_is_named_and_its_page(predict, capsys, tmp_path):
    argv = [*predict, "--data.images", "shop", "--data.query_image", '["shop/green.png", "shop/blue.png"]']
    assert main([*argv, "--output", str(tmp_path / "best.parquet")]) == 0
    table = parquet.read_table(tmp_path / "best.parquet").to_pydict()
    assert [len(paths) for paths in table["path"]] == [3, 3]
    assert [paths[0] for paths in table["path"]] == table["query_image"] == ["shop/green.png", "shop/blue.png"]
    assert (tmp_path / "best.html").is_file()
    assert f"2 predictions in {tmp_path / 'best.parquet'}" in capsys.readouterr().out


def test_searches_that_cannot_be(predict, capsys, tmp_path):
    (tmp_path / "search.jsonl").write_text("my own")
    search = ["--data.images", "shop", "--data.query", "red"]
    for options, rule in (
        (["--data.query", "red"], "query='red' needs data.images, the folder that is searched"),
        (["--data.images", "shop/a/red.png", "--data.query", "red"], "images='shop/a/red.png' is no folder"),
        (["--data.images", "shop", "--open"], "open shows the page of a search"),
        ([*search, "--run_dir", str(tmp_path)], "search.jsonl is no run's: it stays as it is"),
    ):
        assert main([*predict, *options]) != 0
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("error: ")
        assert rule in last
    assert (tmp_path / "search.jsonl").read_text() == "my own"


def test_vectors_and_classes_are_those_of_python(predict, tmp_path, trained):
    assert main([*predict, "--output", str(tmp_path / "pairs.parquet")]) == 0
    pairs = parquet.read_table(tmp_path / "pairs.parquet")
    assert (pairs.num_rows, pairs.schema.field("image_vector").type) == (250, pa.list_(pa.float32()))
    assert main([*predict, "--data.images", "shop", "--output", str(tmp_path / "shop.parquet")]) == 0
    shop = parquet.read_table(tmp_path / "shop.parquet").to_pydict()
    assert shop["image"] == ["a/red.png", "blue.png", "green.png"]
    (tmp_path / "titles.txt").write_text("a red circle\na blue star\n")
    argv = ["--data.predict_file", str(tmp_path / "titles.txt"), "--output", str(tmp_path / "titles.jsonl")]
    assert main([*predict, *argv]) == 0
    titles = [json.loads(line) for line in (tmp_path / "titles.jsonl").read_text().splitlines()]
    model = apps.load("run")
    vectors_ND = model.encode_text(["a red circle", "a blue star", *pairs["text"].to_pylist()[:3]])
    assert_close(torch.tensor([row["text_vector"] for row in titles]), vectors_ND[:2])
    assert_close(torch.tensor(pairs["text_vector"].to_pylist()[:3]), vectors_ND[2:])
    images_ND = model.encode_image([f"shop/{name}" for name in shop["image"]])
    assert_close((torch.tensor(shop["image_vector"]), images_ND.norm(dim=1)), (images_ND, torch.ones(3)))
    red, green = model.predict([trained / "shop/a/red.png", trained / "shop/green.png"], ["a red ring", "a star"])
    assert (red.path, sum(red.top.values())) == (str(trained / "shop/a/red.png"), pytest.approx(1.0, abs=1e-5))
    assert green.probability == max(green.top.values())
