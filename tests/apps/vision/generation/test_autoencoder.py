"""The autoencoder of diffusers' layout: its names and shapes, and a closed form."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from apps.vision.generation.autoencoder import WEIGHTS, Autoencoder

CONFIG = {
    "in_channels": 3,
    "latent_channels": 2,
    "block_out_channels": [4, 8],
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "scaling_factor": 0.5,
}


def write(folder, **changed):
    torch.manual_seed(0)
    model = Autoencoder(CONFIG)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changed}))
    save_file(model.state_dict(), folder / WEIGHTS)
    return model.eval()


def test_the_names_are_those_of_diffusers():
    # As AutoencoderKL of diffusers 0.42.1 has them for this configuration.
    names = {*Autoencoder(CONFIG).state_dict()}
    assert {
        "encoder.conv_in.weight",
        "encoder.down_blocks.0.resnets.0.norm1.weight",
        "encoder.down_blocks.0.downsamplers.0.conv.bias",
        "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
        "encoder.mid_block.attentions.0.to_out.0.weight",
        "decoder.up_blocks.0.upsamplers.0.conv.weight",
        "decoder.up_blocks.1.resnets.1.conv2.weight",
        "quant_conv.weight",
        "post_quant_conv.bias",
    } <= names
    # A block: 8, and 2 of a shortcut where the width changes; the last block has no resizing.
    assert len(names) == (2 + 8 + 2 + 8 + 2 + 16 + 10 + 4) + (2 + 16 + 10 + 16 + 2 + 16 + 2 + 4) + 4


def test_a_folder_is_read_and_halves_images_once(tmp_path):
    model = write(tmp_path / "ae")
    read = Autoencoder.read(tmp_path / "ae")
    image = torch.randn(2, 3, 6, 6)
    latent = read.encode(image)
    assert latent.shape == (2, 2, 3, 3)
    assert read.factor == 2
    mean = model.quant_conv(model.encoder(image))[:, :2]
    assert_close(latent, 0.5 * mean.detach())  # the scaling factor
    assert read.decode(latent).shape == image.shape
    assert not any(parameter.requires_grad for parameter in read.parameters())


def test_an_autoencoder_of_another_shape(tmp_path):
    write(tmp_path / "ae", latent_channels=4)
    with pytest.raises(ValueError, match=r"has another shape than its config\.json: see .*conv"):
        Autoencoder.read(tmp_path / "ae")
    with pytest.raises(ValueError, match="is no folder of diffusers"):
        Autoencoder.read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="takes 3 channels, and the images have 1"):
        Autoencoder(CONFIG).check(8, 1)
    with pytest.raises(ValueError, match="image_size=9 is not divisible by 2"):
        Autoencoder(CONFIG).check(9, 3)
    (tmp_path / "ae" / WEIGHTS).write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"safetensors cannot be read"):
        Autoencoder.read(tmp_path / "ae")
