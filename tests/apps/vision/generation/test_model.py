"""The diffusion transformer, noise and samplers on numbers by hand, and the autoencoder of diffusers' layout."""

from __future__ import annotations

import json
import math

import pytest
import torch
from refusals import refused
from safetensors.torch import save_file
from torch.testing import assert_close

import core
from apps.vision.generation.autoencoder import WEIGHTS, Autoencoder
from apps.vision.generation.diffusion import (
    SamplingConfig,
    add_noise,
    bands,
    coefficients,
    fixed_levels,
    fixed_noise,
    image_and_noise,
    levels_of,
    sample,
    seeded_noise,
)
from apps.vision.generation.model import DiT, DiTConfig

IMAGE = torch.full((1, 1, 2, 2), 2.0)
NOISE = torch.full((1, 1, 2, 2), -1.0)
LABEL = torch.zeros(1, dtype=torch.int64)


def test_each_process_goes_from_image_to_noise_and_ddpm_clips_the_image():
    # 3/4 * 2 + 1/4 * (-1) = 1.25; -1 - 2 = -3
    noised = add_noise("flow", IMAGE, torch.tensor([0.25]), NOISE)
    assert_close((noised.image, noised.target), (torch.full_like(IMAGE, 1.25), torch.full_like(IMAGE, -3.0)))
    a, s = coefficients("ddpm", torch.tensor([0.0, 0.5, 1.0]))
    assert_close((a.square() + s.square(), a[1]), (torch.ones(3), torch.tensor(math.cos(0.2475 * math.pi))))
    noised = add_noise("ddpm", IMAGE, torch.tensor([0.5]), NOISE)
    assert_close((noised.image[0, 0, 0, 0], noised.target), (2 * a[1] - s[1], NOISE))
    level = torch.tensor([0.5])
    a, s = coefficients("ddpm", level)
    bounds = (torch.tensor(-1.0), torch.tensor(1.0))
    x = a * IMAGE + s * NOISE
    image, noise = image_and_noise("ddpm", x, level, NOISE, bounds)
    assert_close(image, torch.ones_like(IMAGE))  # 2 is cut to 1
    assert_close(a * image + s * noise, x)


@pytest.mark.parametrize("process", ["flow", "ddpm"])
def test_the_true_prediction_gives_back_image_and_noise(process):
    noised = add_noise(process, IMAGE, torch.tensor([0.3]), NOISE)
    image, noise = image_and_noise(process, noised.image, noised.level_B, noised.target)
    assert_close((image, noise), (IMAGE, NOISE))


def test_levels_are_the_quantiles_of_training_and_noise_follows_from_the_number():
    # logit-normal: the median is sigmoid(0) = 1/2, and 84.13 % lie below sigmoid(1)
    assert_close(levels_of("flow", torch.tensor([0.5, 0.841345])), torch.tensor([0.5, 1 / (1 + math.exp(-1))]))
    assert levels_of("ddpm", torch.tensor([0.0001, 0.0015, 0.9999])).tolist() == pytest.approx([0.001, 0.002, 1.0])
    assert bands(torch.tensor([0.0, 0.05, 0.1, 0.99, 1.0])).tolist() == [0, 0, 1, 9, 9]
    image = torch.zeros(3, 1, 2, 2)
    whole = fixed_noise("flow", image, torch.tensor([5, 9, 7]))
    alone = fixed_noise("flow", image[:1], torch.tensor([9]))
    assert torch.equal(whole.image[1:2], alone.image)
    assert_close(whole.level_B[1], alone.level_B[0])
    assert not torch.equal(whole.image[0], whole.image[1])
    level = fixed_levels("flow", torch.arange(1000))
    assert 0.48 < float((level < 0.5).double().mean()) < 0.52  # half of the levels lie below the median
    assert not torch.equal(seeded_noise([(0, 1)], (4,)), seeded_noise([(1, 1)], (4,)))


def straight(x, level_B, label_B):
    """The network of a single image 2 from any noise: it knows where the line began."""
    return (x - 2.0) / level_B.view(-1, 1, 1, 1)


@pytest.mark.parametrize("sampler", ["euler", "heun", "ddim"])
def test_every_sampler_follows_a_straight_line_to_its_end(sampler):
    found = sample(straight, "flow", NOISE, LABEL, SamplingConfig(sampler, 3, 1.0))
    assert_close(found, torch.full_like(NOISE, 2.0))


@pytest.mark.parametrize(("sampler", "steps", "error"), [("ddim", 3, 1e-4), ("euler", 200, 1e-4), ("heun", 50, 1e-3)])
def test_every_sampler_follows_the_curve_of_ddpm_to_its_end(sampler, steps, error):
    # The noise of a single image 0.5 is (x - 0.5 a) / s: x = 0.5 a + s e, of which DDIM makes no error.
    def network(x, level_B, label_B):
        a, s = coefficients("ddpm", level_B.view(-1, 1, 1, 1))
        return (x - 0.5 * a) / s

    found = sample(network, "ddpm", NOISE, LABEL, SamplingConfig(sampler, steps, 1.0))
    assert float((found - 0.5).abs().max()) < error


def test_ddim_is_euler_on_a_flow_and_not_on_ddpm():
    network = lambda x, level_B, label_B: torch.sin(3 * x) + level_B.view(-1, 1, 1, 1)  # noqa: E731
    noise = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    label = torch.zeros(2, dtype=torch.int64)
    bounds = (torch.tensor(-1.0), torch.tensor(1.0))
    (flow_euler, flow_ddim), (ddpm_euler, ddpm_ddim) = (
        [sample(network, process, noise, label, SamplingConfig(s, 4, 1.0), bounds=bounds) for s in ("euler", "ddim")]
        for process in ("flow", "ddpm")
    )
    assert_close(flow_euler, flow_ddim)
    assert (ddpm_euler - ddpm_ddim).abs().max() > 0.01
    assert ddpm_ddim.abs().max() <= 1.0


def test_guidance_goes_on_beyond_the_class_and_evaluates_once_for_both():
    calls = []

    def network(x, level_B, label_B):
        calls.append(label_B.tolist())
        return -label_B.view(-1, 1, 1, 1).float().expand_as(x)

    # One step of 1: x + velocity back. Class 3 has velocity -3, no class (7) has -7: -7 + 2 * (-3 + 7) = 1.
    found = sample(network, "flow", NOISE, LABEL + 3, SamplingConfig("euler", 1, 2.0), null_class=7)
    assert calls == [[3, 7]]
    assert_close(found, NOISE - 1.0)
    with pytest.raises(ValueError, match=r"sampling\.guidance=2\.0 needs a null class"):
        sample(network, "flow", NOISE, LABEL, SamplingConfig("euler", 1, 2.0))


def test_evaluations_are_counted_and_options_have_a_range():
    # Heun: two a step but the last, times two for guidance.
    assert (SamplingConfig("heun", 20, 1.5).evaluations, SamplingConfig("euler", 20, 1.0).evaluations) == (78, 20)
    seen = []
    sample(lambda x, t, y: seen.append(len(x)) or x, "flow", NOISE, LABEL, SamplingConfig("heun", 5, 1.5), null_class=1)
    assert sum(seen) == SamplingConfig("heun", 5, 1.5).evaluations
    refused(r"sampling\.steps=0 is not at least 1", SamplingConfig, steps=0)
    refused("option='step' is not one of sampler, steps, guidance", SamplingConfig().changed, {"step": 3})
    assert SamplingConfig().changed({"steps": 3}) == SamplingConfig(steps=3)


TINY = DiTConfig(patch_size=2, embed_dim=8, depth=2, num_heads=2)
MOE = core.MoEConfig(4, core.TokenChoice(2), core.FFN(8), num_shared_experts=1)


def built(**options):
    torch.manual_seed(0)
    return DiT(TINY, **{"size": 4, "in_chans": 3, "num_classes": 5, "ffn": MOE, "moe_blocks": "all", **options})


def inputs(number=3):
    draw = torch.Generator().manual_seed(1)
    return torch.randn(number, 3, 4, 4, generator=draw), torch.tensor([0.05, 0.55, 0.95])[:number], torch.arange(number)


def test_at_the_start_blocks_add_nothing_and_patches_stay_in_place():
    model = built()
    assert torch.equal(model(*inputs()), torch.zeros(3, 3, 4, 4))
    x, context = torch.randn(2, 4, 8), core.RoutingContext()
    assert torch.equal(model.blocks[0](x, torch.randn(2, 8), context), x)
    # The head gives every token its own first number at each of the 2 * 2 * 3 values of its patch.
    with torch.no_grad():
        model.head.weight[:, 0] = 1.0
    tokens = {}
    model.norm.register_forward_hook(lambda module, args, out: tokens.update(out=out))
    y, rows = model(*inputs()), tokens["out"][..., 0].unflatten(1, (2, 2))
    assert_close(y, rows.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None].expand(-1, 3, -1, -1))


def test_routers_know_places_levels_classes_and_the_condition():
    model, seen = built(), []
    model.blocks[1].mlp.router.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    model(*inputs())
    (context,) = seen
    assert (context.token_ids_BS[0].tolist(), context.task_ids_B.tolist()) == ([0, 1, 2, 3], [0, 5, 9])
    assert context.domain_ids_B.tolist() == [0, 1, 2]
    model = built()
    torch.nn.init.normal_(model.blocks[0].modulation.weight, std=100.0)
    image, _, label = inputs()
    with core.record(model) as tape:
        model(image, torch.full((3,), 0.1), label)
        model(image, torch.full((3,), 0.9), label)
    first, second = (entry.routing.evidence.logits_TE for entry in tape.entries if entry.name == "blocks.0.mlp")
    assert (first - second).abs().max() > 0.01
    model = built(ffn=core.MoEConfig(4, core.Task(num_tasks=10, top_k=1), core.FFN(8)))
    with core.record(model) as tape:
        model(*inputs())
    experts = tape.entries[0].routing.expert_ids_N.view(3, 4)
    assert all(len(set(row)) == 1 for row in experts.tolist())  # all patches of an image have its level


CONFIG = {"in_channels": 3, "latent_channels": 2, "block_out_channels": [4, 8], "layers_per_block": 1}
CONFIG |= {"norm_num_groups": 2, "scaling_factor": 0.5}


def write(folder, **changed):
    torch.manual_seed(0)
    model = Autoencoder(CONFIG)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changed}))
    save_file(model.state_dict(), folder / WEIGHTS)
    return model.eval()


def test_the_names_are_those_of_diffusers_and_shapes_must_fit():
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
    refused(r"dit\.patch_size=2 does not divide 5", built, size=5)
    refused(r"dit\.embed_dim=10 is not divisible by num_heads=4", DiTConfig, embed_dim=10, num_heads=4)
    refused(r"dit\.embed_dim=6 is not divisible by 4", DiTConfig, embed_dim=6, num_heads=2)


def test_an_autoencoder_is_read_and_halves_images_once(tmp_path):
    model, read = write(tmp_path / "ae"), Autoencoder.read(tmp_path / "ae")
    image = torch.randn(2, 3, 6, 6)
    latent = read.encode(image)
    assert (latent.shape, read.factor) == ((2, 2, 3, 3), 2)
    assert_close(latent, 0.5 * model.quant_conv(model.encoder(image))[:, :2].detach())  # the scaling factor
    assert read.decode(latent).shape == image.shape
    assert not any(parameter.requires_grad for parameter in read.parameters())
    write(tmp_path / "ae", latent_channels=4)
    refused(r"has another shape than its config\.json: see .*conv", Autoencoder.read, tmp_path / "ae")
    refused("is no folder of diffusers", Autoencoder.read, tmp_path / "nowhere")
    refused("takes 3 channels, and the images have 1", Autoencoder(CONFIG).check, 8, 1)
    refused("image_size=9 is not divisible by 2", Autoencoder(CONFIG).check, 9, 3)
    (tmp_path / "ae" / WEIGHTS).write_bytes(b"no weights")
    refused(r"safetensors cannot be read", Autoencoder.read, tmp_path / "ae")
