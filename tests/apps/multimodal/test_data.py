"""Images and texts to batches: what a batch holds, its order, resuming, augmentation, and a checkpoint's encoding."""

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from made_captions import colour, data_of, picture, write_csv, write_pictures, write_products, write_shop
from refusals import refused

from apps.data.subwords import SubwordConfig
from apps.multimodal.data import ImageTextData
from apps.multimodal.pairs.encoding import PairEncoding
from apps.multimodal.pairs.pairs import PairBatch


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    return write_shop(tmp_path / "shop")


def batches(data: ImageTextData, epoch: int = 0) -> list[PairBatch]:
    loader = data.train_dataloader()
    loader.batch_sampler.sampler.set_epoch(epoch)
    return list(loader)


def same(a: list[PairBatch], b: list[PairBatch]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, chain(*a), chain(*b)))


def test_image_text_and_labels_of_a_pair_belong_together(shop):
    data = data_of(shop, attributes=["colour"], mean=(0, 0, 0), std=(1, 1, 1), batch_size=7)
    assert data.sizes() == {"train": 24, "val": 3, "test": 3}
    assert (data.class_names, data.attributes) == ({"colour": ("blue", "green", "red")}, {"colour": 3})
    seen = []
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for batch in loader:
            for row, number in enumerate(batch.index_B.tolist()):
                name = f"picture {number} in {colour(number)}"
                assert data.texts[batch.caption_B[row]] == name
                assert data.image_name(int(batch.image_B[row])) == str(shop / f"{number}.png")
                assert data.class_names["colour"][batch.label_BA[row, 0]] == colour(number)
                assert [i for i in batch.text_BL[row].tolist() if i] == data.encoding.text.ids(name)
                paint = torch.tensor(picture(number).getpixel((0, 0))) / 255
                torch.testing.assert_close(batch.image[row], paint[:, None, None].expand(3, 8, 8))
                seen.append(number)
    assert sorted(seen) == list(range(30))


def test_equal_captions_have_one_number_and_a_label_that_training_lacks_none(tmp_path):
    write_pictures(tmp_path / "own", 20)
    table = [{"image": f"{n}.png", "caption": text} for n in range(20) for text in (f"own {n}", f"pair {n // 2}")]
    write_csv(tmp_path / "own" / "t.csv", table)
    data = data_of(tmp_path / "own")
    assert data.sizes() == {"train": 32, "val": 4, "test": 4}  # images 2n and 2n + 1 stay together
    whole = data.examples("train").__getitems__(range(32))
    assert (len(whole.image_B.unique()), len(whole.caption_B.unique())) == (16, 16 + 8)
    assert (whole.index_B // 2 == whole.image_B).all()
    titles, kinds = [f"title {n}" for n in range(40)], ["shirt", "shoe"] * 19 + ["", "shirt"]
    write_products(tmp_path / "p", titles, kind=kinds)
    data = data_of(tmp_path / "p", "fashion_products", attributes=["kind"])
    labels = data.opened.label_IA[:, 0].tolist()
    assert (labels, data.image_name(3)) == ([{"shirt": 0, "shoe": 1, "": -1}[kind] for kind in kinds], "103")
    assert data.sizes() == {"train": 32, "val": 4, "test": 4}


@pytest.mark.parametrize(("lower_case", "count"), [(None, 5), (False, 15)])
def test_captions_that_are_one_to_the_model_have_one_number(tmp_path, lower_case, count):
    # Five captions, each in four spellings, of which two differ by a space alone.
    write_pictures(tmp_path / "own", 20)
    texts = [(f"pair {k}", f"Pair {k}", f"pair  {k}", f"PAIR {k}") for k in range(5)]
    table = [{"image": f"{n}.png", "caption": texts[n // 4][n % 4]} for n in range(20)]
    write_csv(tmp_path / "own" / "t.csv", table)
    data = data_of(tmp_path / "own", lower_case=lower_case, test_size=4, val_size=4)
    assert len(data.texts) == count
    caption_N = data.opened.caption_N
    assert [data.texts[i] for i in caption_N[::4]] == [data.texts[i] for i in caption_N[2::4]] == [t[0] for t in texts]


def test_absent_classes_and_captions_that_splits_share_are_noted(shop, caplog):
    data = data_of(shop, attributes=["colour"], test_size=1)
    data.setup("test")
    (number,) = data.opened.index["test"].tolist()
    others = ", ".join(sorted({"red", "green", "blue"} - {colour(number)}))
    assert f"the test images have none of colour {others}: the figures are of the other classes" in caplog.text
    one = [{"image": f"{n}.png", "caption": f"picture {n}", "colour": "red"} for n in range(30)]
    write_csv(shop / "titles.csv", one)
    refused("attribute 'colour' has only 'red' in the training images", data_of(shop, attributes=["colour"]).sizes)
    parts = ["train"] * 26 + ["test"] * 4
    table = [{"image": f"{n}.png", "caption": f"Picture {n % 28}", "part": part} for n, part in enumerate(parts)]
    write_csv(shop / "titles.csv", table)
    data = data_of(shop, split_column="part", val_size=0)
    assert data.sizes() == {"train": 26, "val": 0, "test": 4}
    assert "2 of 4 test captions are captions of training images too" in caplog.text


@pytest.mark.parametrize("options", [{}, {"horizontal_flip": True, "random_resized_crop": 0.5, "crop_padding": 1}])
def test_batches_depend_on_seed_and_epoch_alone_and_go_on_in_mid_epoch(shop, options):
    options = {"batch_size": 5, **options}
    first = batches(data_of(shop, **options))
    torch.manual_seed(9)
    assert same(first, batches(data_of(shop, **options)))
    assert not same(first, batches(data_of(shop, **options), epoch=1))
    assert not same(first, batches(data_of(shop, **options, **{"seed": 1})))
    loader = data_of(shop, **options).train_dataloader()
    running = iter(loader)
    before, resumed = [next(running), next(running)], data_of(shop, **options).train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    assert same(before + list(resumed), first)


def test_training_images_alone_are_changed_at_random():
    options = {"seed": 0, "tokenizer": SubwordConfig(vocab_size=400)}
    plain, mirrored = (ImageTextData("shapes", horizontal_flip=flip, **options) for flip in (False, True))
    for name in ("val_dataloader", "test_dataloader", "train_eval_dataloader"):
        (a, *_), (b, *_) = getattr(plain, name)(), getattr(mirrored, name)()
        assert torch.equal(a.image, b.image)
    a, b = batches(plain)[0], batches(mirrored)[0]
    assert torch.equal(a.index_B, b.index_B)
    is_mirrored_B = (a.image.flip(3) == b.image).flatten(1).all(1)
    assert ((a.image == b.image).flatten(1).all(1) | is_mirrored_B).all()
    assert 40 < int(is_mirrored_B.sum()) < 90  # of 128


def test_a_long_caption_is_cut_and_a_subset_trains_on_fewer_pairs(shop):
    data = data_of(shop, subset=10, attributes=["colour"])
    assert data.sizes() == {"train": 10, "val": 3, "test": 3}
    assert set(data.opened.index["train"].tolist()) < set(data_of(shop).opened.index["train"].tolist())
    refused("subset=25 exceeds the 24 training pairs", data_of(shop, subset=25).sizes)
    table = [{"image": f"{n}.png", "caption": f"picture {n} " + "very " * (10_000 * (n == 7))} for n in range(30)]
    write_csv(shop / "titles.csv", table)
    data = data_of(shop, max_tokens=12)
    widths = [batch.text_BL.shape[1] for batch in (*data.train_eval_dataloader(), *data.val_dataloader())]
    widths += [batch.text_BL.shape[1] for batch in data.test_dataloader()]
    assert max(widths) == 12
    assert len(data.texts[7]) > 50_000  # the text itself is kept


def test_a_checkpoints_encoding_is_used_for_other_files(shop, tmp_path):
    trained = data_of(shop, attributes=["colour"])
    state = trained.encoding_state
    assert PairEncoding.from_state(state) == trained.encoding
    write_pictures(tmp_path / "more", 12, side=20)
    table = [{"image": f"{n}.png", "caption": f"another {n}", "colour": ["red", "mauve"][n % 2]} for n in range(12)]
    write_csv(tmp_path / "more" / "t.csv", table)
    other = ImageTextData("image_captions", root=str(tmp_path / "more"), cache_dir=str(tmp_path / "cache"))
    assert other.image_size == 224
    other.adopt(state)
    assert (other.image_size, other.max_tokens, other.vocab_size) == (8, 32, trained.vocab_size)
    assert (other.encoding, next(iter(other.test_dataloader())).image.shape[1:]) == (trained.encoding, (3, 8, 8))
    # the column that the checkpoint knows is read, and "mauve" is none of its classes
    assert other.opened.label_IA[:, 0].tolist() == [trained.class_names["colour"].index("red"), -1] * 6
    shapes = ImageTextData("shapes")
    shapes.adopt({**state, "attributes": {"shape": ["star", "cube"], "colour": ["red"], "mood": ["good"]}})
    assert shapes.attributes == {"shape": 2, "colour": 1, "mood": 1}
    assert shapes.opened.label_IA.unique(dim=0).tolist() == [[-1, -1, -1], [-1, 0, -1], [0, -1, -1], [0, 0, -1]]
    refused("encoding", other.adopt, {"words": ["a"]})


@pytest.mark.parametrize("options, message", [
    ({"image_size": 16}, "data.image_size=16 is not the checkpoint's, whose images have image_size=8: leave it"),
    ({"mean": (0.0, 0.0, 0.0)}, "data.mean=.* is not the checkpoint's"),
    ({"max_tokens": 9}, "data.max_tokens=9 is not the checkpoint's, which was trained with max_tokens=32"),
    ({"tokenizer": SubwordConfig(vocab_size=262)},
     r"data.tokenizer asks for 262 learned subwords, and the checkpoint has \d+ subwords"),
    ({"attributes": ["size"]}, r"data.attributes=\['size'\] are not the checkpoint's, which knows colour"),
])  # fmt: skip
def test_an_option_that_is_not_the_checkpoints_is_refused(shop, options, message):
    state = data_of(shop, attributes=["colour"]).encoding_state
    refused(message, data_of(shop, **options).adopt, state)


@pytest.mark.parametrize("options, message", [
    ({"dataset": "shape"}, "dataset='shape' is not one of .*; did you mean 'shapes'"),
    ({"image_pattern": "a.jpg"}, "image_pattern='a.jpg' has no {}, which stands for what 'image' holds"),
    ({"table": "t.csv"}, "table='t.csv' is for dataset='image_captions'; shapes has its own layout"),
    ({"attributes": ["shape", "shape"]}, "names a column twice"),
    ({"attributes": ["sizes"]}, "attributes='sizes' is not one of .*did you mean 'size'"),
    ({"max_tokens": 2}, "max_tokens=2 must be at least 3"),
    ({"test_size": 0.1}, "test_size=0.1: the files have test images of their own"),
    ({"val_size": 1.5}, "val_size=1.5 is neither"),
    ({"eval_crop": 0.0}, "eval_crop=0.0 must be above 0"),
    ({"std": (1, 1)}, "has 2 values for 3 channels"),
    ({"on_bad_row": "drop"}, "on_bad_row='drop' is not one of error, skip"),
])  # fmt: skip
def test_an_option_out_of_its_range_is_refused(options: dict[str, Any], message: str):
    refused(message, lambda: ImageTextData(**options).sizes())
