"""Images of every mode and size become pixels of one size; bad ones are named or left out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from made_captions import data_of, picture, write_csv, write_products, write_shop
from PIL import Image
from refusals import refused

from apps.multimodal.pairs.images import DecodedPixels, ImageFiles, store_pixels
from apps.vision.encoding import evaluation_transform

RED = np.array([200, 40, 20], np.uint8)


def write_modes(folder: Path) -> dict[str, Path]:
    """Write the same red, of grey 90, in every mode and in odd sizes."""
    folder.mkdir(exist_ok=True)
    red = Image.fromarray(np.broadcast_to(RED, (12, 20, 3)).copy())
    blue, grey = Image.new("RGB", (20, 12), (0, 0, 255)), np.full((12, 20), 90, np.uint8)
    paths = {
        name: folder / name
        for name in (
            "rgb.png", "wide.png", "one.png", "alpha.png", "palette.png", "cmyk.jpg", "animated.gif", "animated.png",
            "animated.webp", "grey.png", "grey16.png", "bits.png", "clear.gif",
        )
    }  # fmt: skip
    red.save(paths["rgb.png"])
    red.resize((300, 3)).save(paths["wide.png"])
    red.resize((1, 1)).save(paths["one.png"])
    red.convert("RGBA").save(paths["alpha.png"])
    red.convert("P").save(paths["palette.png"])
    red.convert("CMYK").save(paths["cmyk.jpg"], quality=100)
    for ending in ("gif", "png", "webp"):
        first = red.convert("RGBA") if ending == "png" else red
        extra = {"lossless": True} if ending == "webp" else {}
        first.save(paths[f"animated.{ending}"], save_all=True, append_images=[blue.convert(first.mode)], **extra)
    Image.fromarray(grey).save(paths["grey.png"])
    Image.fromarray(grey.astype(np.uint16) * 257).save(paths["grey16.png"])
    Image.fromarray(grey > 0).save(paths["bits.png"])
    clear = Image.new("P", (20, 12))
    clear.putpalette([*RED.tolist(), 0, 255, 0])
    clear.save(paths["clear.gif"], transparency=0, background=1)
    return paths


def test_every_mode_is_read_in_its_colour_and_stored_once(tmp_path, monkeypatch):
    paths = write_modes(tmp_path / "modes")
    files, transform = ImageFiles(tuple(paths.values())), evaluation_transform(8, 3, 1.0)
    pixels = store_pixels(files, transform, (3, 8, 8), tmp_path / "cache", "x", [], 2)(torch.arange(len(paths)))
    assert (pixels.shape, pixels.dtype) == ((len(paths), 3, 8, 8), torch.uint8)
    wanted = {"grey.png": [90] * 3, "grey16.png": [90] * 3, "bits.png": [255] * 3}
    for name, image in zip(paths, pixels, strict=True):
        mean = image.float().mean((1, 2))
        # a palette, GIF's too, and a JPEG keep the colour only nearly
        assert (mean - torch.tensor(wanted.get(name, RED.tolist())).float()).abs().max() < 12, name
    paths = tuple(paths.values())
    transform, shape = evaluation_transform(8, 3, 0.9), (3, 8, 8)
    stored = store_pixels(ImageFiles(paths), transform, shape, tmp_path / "cache", "x", [0.9], 0)
    index = torch.tensor([3, 0, 3])
    assert torch.equal(stored(index), DecodedPixels(ImageFiles(paths), transform)(index))
    monkeypatch.setattr(ImageFiles, "decode", None)  # a second reading would fail
    again = store_pixels(ImageFiles(paths), transform, shape, tmp_path / "cache", "x", [0.9], 0)
    assert torch.equal(again(index), stored(index))


@pytest.mark.parametrize("store", [True, False])
def test_an_unreadable_image_is_named_or_left_out_and_counted(tmp_path, store, caplog):
    shop, cut = write_shop(tmp_path / "shop"), tmp_path / "shop" / "5.png"
    (shop / "3.png").write_bytes(b"no image")
    picture(5, side=64).save(cut)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    data, more = data_of(shop, store_images=store), " and 1 more" if store else ""
    loaders = (data.train_eval_dataloader, data.test_dataloader, data.val_dataloader)
    rule = rf"titles.csv, row 4: .*3.png is corrupt: it is no image{more}; data.on"
    refused(rule, lambda: [list(loader()) for loader in loaders])
    data = data_of(tmp_path / "shop", store_images=store, on_bad_row="skip")
    assert sum(data.sizes().values()) == 28
    assert "on_bad_row=skip leaves out 2 unreadable images: " in caplog.text
    assert "titles.csv, row 6: " in caplog.text
    assert data.describe().endswith("left out: 2 with an unreadable image")
    numbers = [i for split in ("train", "val", "test") for i in data.examples(split).__getitems__(range(2)).image_B]
    assert not {3, 5} & {int(i) for i in numbers}


def test_a_corrupt_file_is_named_and_a_missing_row_makes_no_gap(tmp_path):
    write_products(tmp_path / "products", [f"title {n}" for n in range(20)])
    path = tmp_path / "products" / "images112.npz"
    with np.load(path) as arrays:
        content = dict(arrays)
    content["jpeg"][content["offset"][7] : content["offset"][8]] = 0
    np.savez(path, **content)
    data = data_of(tmp_path / "products", "fashion_products", attributes=[])
    refused(r"products.csv, row 8: .*images112.npz: image '107' is corrupt: .*; data.on_bad_row=skip", data.sizes)
    write_shop(tmp_path / "shop")
    table = [{"image": f"{n}.png", "caption": f"text {n}"} for n in (*range(10), 99)]
    write_csv(tmp_path / "shop" / "titles.csv", table)
    with pytest.raises(ValueError, match=r"titles.csv, row 11: the image '.*99.png' is missing; data.on_bad_row=skip"):
        data_of(tmp_path / "shop").sizes()
    data = data_of(tmp_path / "shop", on_bad_row="skip")
    assert data.sizes() == {"train": 8, "val": 1, "test": 1}
    assert data.describe().endswith("left out: 1 with a missing image")
