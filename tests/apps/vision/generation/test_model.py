"""The diffusion transformer and the autoencoder of diffusers' layout: shapes, conditions and closed forms."""

import json

import torch
from refusals import refused
from safetensors.torch import save_file
from torch.testing import assert_close

import core
from apps.vision.generation.autoencoder import WEIGHTS, Autoencoder
from apps.vision.generation.model import DiT, DiTConfig

TINY = DiTConfig(patch_size=2, embed_dim=8, depth=2, num_heads=2)
MOE = core.MoEConfig(4, core.TokenChoice(2), core.FFN(8), num_shared_experts=1)


def built(**options):
    torch.manual_seed(0)
    return DiT(TINY, **{"size": 4, "in_chans": 3, "num_classes": 5, "ffn": MOE, "moe_blocks": "all", **options})


def inputs(number=3):
    draw = torch.Generator().manual_seed(1)
    return torch.randn(number, 3, 4, 4, generator=draw), torch.tensor([0.05, 0.55, 0.95])[:number], torch.arange(number)


def test_at_the_start_blocks_add_nothing_and_the_prediction_is_zero():
    model = built()
    assert torch.equal(model(*inputs()), torch.zeros(3, 3, 4, 4))
    x = torch.randn(2, 4, 8)
    context = core.RoutingContext()
    assert torch.equal(model.blocks[0](x, torch.randn(2, 8), context), x)


def test_a_patch_of_the_output_is_where_the_patch_of_the_input_was():
    model = built()
    # The head gives every token its own first number at each of the 2 * 2 * 3 values of its patch.
    with torch.no_grad():
        model.head.weight[:, 0] = 1.0
    tokens = {}
    model.norm.register_forward_hook(lambda module, args, out: tokens.update(out=out))
    y = model(*inputs())
    rows = tokens["out"][..., 0].unflatten(1, (2, 2))
    assert_close(y, rows.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None].expand(-1, 3, -1, -1))


def test_routers_know_places_levels_and_classes():
    model, seen = built(), []
    model.blocks[1].mlp.router.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    model(*inputs())
    (context,) = seen
    assert (context.token_ids_BS[0].tolist(), context.task_ids_B.tolist()) == ([0, 1, 2, 3], [0, 5, 9])
    assert context.domain_ids_B.tolist() == [0, 1, 2]


def test_the_condition_reaches_the_router_of_a_trained_block():
    model = built()
    torch.nn.init.normal_(model.blocks[0].modulation.weight, std=100.0)
    image, _, label = inputs()
    with core.record(model) as tape:
        model(image, torch.full((3,), 0.1), label)
        model(image, torch.full((3,), 0.9), label)
    first, second = (entry.routing.evidence.logits_TE for entry in tape.entries if entry.name == "blocks.0.mlp")
    assert (first - second).abs().max() > 0.01


def test_a_router_by_noise_level():
    model = built(ffn=core.MoEConfig(4, core.Task(num_tasks=10, top_k=1), core.FFN(8)))
    with core.record(model) as tape:
        model(*inputs())
    experts = tape.entries[0].routing.expert_ids_N.view(3, 4)
    assert all(len(set(row)) == 1 for row in experts.tolist())  # all patches of an image have its level


def test_shapes_that_cannot_be_built():
    refused(r"dit\.patch_size=2 does not divide 5", built, size=5)
    refused(r"dit\.embed_dim=10 is not divisible by num_heads=4", DiTConfig, embed_dim=10, num_heads=4)
    refused(r"dit\.embed_dim=6 is not divisible by 4", DiTConfig, embed_dim=6, num_heads=2)


CONFIG = {"in_channels": 3, "latent_channels": 2, "block_out_channels": [4, 8], "layers_per_block": 1}
CONFIG |= {"norm_num_groups": 2, "scaling_factor": 0.5}


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
        *("encoder.conv_in.weight", "encoder.down_blocks.0.resnets.0.norm1.weight", "quant_conv.weight"),
        *("encoder.down_blocks.0.downsamplers.0.conv.bias", "encoder.down_blocks.1.resnets.0.conv_shortcut.weight"),
        *("encoder.mid_block.attentions.0.to_out.0.weight", "decoder.up_blocks.0.upsamplers.0.conv.weight"),
        *("decoder.up_blocks.1.resnets.1.conv2.weight", "post_quant_conv.bias"),
    } <= names
    # A block: 8, and 2 of a shortcut where the width changes; the last block has no resizing.
    assert len(names) == (2 + 8 + 2 + 8 + 2 + 16 + 10 + 4) + (2 + 16 + 10 + 16 + 2 + 16 + 2 + 4) + 4


def test_a_folder_is_read_and_halves_images_once(tmp_path):
    model = write(tmp_path / "ae")
    read = Autoencoder.read(tmp_path / "ae")
    image = torch.randn(2, 3, 6, 6)
    latent = read.encode(image)
    assert (latent.shape, read.factor) == ((2, 2, 3, 3), 2)
    mean = model.quant_conv(model.encoder(image))[:, :2]
    assert_close(latent, 0.5 * mean.detach())  # the scaling factor
    assert read.decode(latent).shape == image.shape
    assert not any(parameter.requires_grad for parameter in read.parameters())


def test_an_autoencoder_of_another_shape(tmp_path):
    write(tmp_path / "ae", latent_channels=4)
    refused(r"has another shape than its config\.json: see .*conv", Autoencoder.read, tmp_path / "ae")
    refused("is no folder of diffusers", Autoencoder.read, tmp_path / "nowhere")
    refused("takes 3 channels, and the images have 1", Autoencoder(CONFIG).check, 8, 1)
    refused("image_size=9 is not divisible by 2", Autoencoder(CONFIG).check, 9, 3)
    (tmp_path / "ae" / WEIGHTS).write_bytes(b"no weights")
    refused(r"safetensors cannot be read", Autoencoder.read, tmp_path / "ae")
