"""ImageGenerator: its loss, and a run from training to files, a page and a graph."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from doc_scripts import output, script
from PIL import Image
from reexported import reexported
from refusals import refused
from torch.testing import assert_close
from torch_graphs import output_in_torch
from undrawn import undrawn as undrawn

import apps
import core
from apps.cli import main
from apps.vision.batch import ImageBatch
from apps.vision.generation.autoencoder import WEIGHTS, Autoencoder
from apps.vision.generation.diffusion import SamplingConfig, fixed_noise
from apps.vision.generation.model import DiTConfig
from apps.vision.generation.module import ImageGenerator

SCRIPT = script("docs/reference/onnx_scripts.md", "draw.py")
CONFIG = Path(__file__).parents[4] / "configs" / "vision" / "generation" / "digits.yaml"
TINY = DiTConfig(patch_size=4, embed_dim=8, depth=2, num_heads=2)
ENCODING = {"class_names": list("0123456789"), "image_size": 8, "in_chans": 1, "mean": [0.5], "std": [0.5]}
MOE = core.MoEConfig(4, core.TokenChoice(2), core.FFN(8), num_shared_experts=1)
SMALL = [
    *("--model.dit.embed_dim", "16", "--model.dit.depth", "2", "--model.dit.patch_size", "4"),
    *("--model.moe.num_experts", "4", "--model.sampling.steps", "2", "--model.metrics.images", "20"),
    *("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3", "--trainer.accelerator", "cpu"),
]


def built(**options):
    torch.manual_seed(0)
    return ImageGenerator(**{"dit": TINY, "moe": MOE, "image_size": 8, "report": None, **options})


def batch(number=4):
    image = torch.randn(number, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return ImageBatch(image, torch.arange(number), torch.arange(number) + 100)


def test_the_loss_follows_from_the_number_and_training_hides_some_classes():
    module = built().eval().requires_grad_(False)
    out = module.task_loss(batch())
    # The prediction is 0 at first, so the loss is the mean square of noise minus image.
    noised = fixed_noise("flow", batch().image, batch().index)
    assert_close((out.outputs, out.loss), (noised.target.square().mean((1, 2, 3)), out.outputs.mean()))
    assert_close(module.task_loss(ImageBatch(*(part[1:3] for part in batch()))).outputs, out.outputs[1:3])
    values = module.comparison.example_values([out])
    assert values.name == "loss"
    assert not values.higher_is_better
    assert values.mean == pytest.approx(float(out.loss))
    module, seen = built(moe=None, class_dropout=0.5), []
    module.model.class_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for _ in range(50):
        module.task_loss(batch())
    label = torch.stack(seen)
    assert 0.35 < float((label == 10).double().mean()) < 0.65  # 200 images, half of them +- 4 standard deviations
    seen.clear()
    module.eval().task_loss(batch())
    assert seen[0].tolist() == [0, 1, 2, 3]


def test_dense_twins_cost_the_same_and_values_go_together():
    module = built()
    flops, twin = (
        module.comparison.routed_layers().flops_per_token(),
        module.comparison.baselines()["dense_equal_flops"].build(),
    )
    ffn = twin.model.blocks[1].mlp
    # Two matmuls of 8 x F, two FLOPs each; the router's 2 * 8 * 4 are in the sparse layer's.
    assert (4 * 8 * ffn.fc1.out_features, core.moe_layers(twin)) == (pytest.approx(flops, rel=0.1), {})
    refused(r"sampling\.guidance=1\.5 needs a null class, and class_dropout=0", built, class_dropout=0.0)
    built(class_dropout=0.0, sampling=SamplingConfig(guidance=1.0))
    with pytest.raises(ValueError, match="num_tasks=3, which does not fit the data: they have 10"):
        built(moe=core.MoEConfig(4, core.Task(num_tasks=3), core.FFN(8)))
    refused("process='sde' is not one of", built, process="sde")
    refused("autoencoder=nowhere is no folder of diffusers", built, autoencoder="nowhere")


def test_latents_are_drawn_and_the_checkpoint_has_no_autoencoder(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    sizes = {"block_out_channels": [4, 4], "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 2}
    config = {"in_channels": 1, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(Autoencoder(config).state_dict(), tmp_path / WEIGHTS)
    monkeypatch.chdir(tmp_path.parent)
    module = built(autoencoder=tmp_path.name)
    assert module.hparams["autoencoder"] == str(tmp_path)  # a checkpoint is read in other directories too
    module._encoding = ENCODING
    assert (module.drawn_shape, module.eval().task_loss(batch()).outputs.shape) == ((2, 4, 4), (4,))
    assert module.predict(3, number=2, steps=2)[1].size == (8, 8)
    assert not any("coder" in name for name in module.state_dict())


@pytest.mark.parametrize("router", [core.ExpertChoice(1.0, predictor_dim=4), core.TokenChoice(2)])
def test_an_image_does_not_depend_on_the_classes_beside_it(router):
    module = built(moe=core.MoEConfig(4, router, core.FFN(8)))
    for part in (module.model.head, *(block.modulation for block in module.model.blocks)):
        torch.nn.init.normal_(part.weight, std=0.3)
    module._encoding = ENCODING
    both, alone = (module.predict(classes, number=2, seed=3, steps=3) for classes in (["3", 7], [7]))
    assert [np.array_equal(a, b) for a, b in zip(both[2:], alone, strict=True)] == [True, True]
    assert not np.array_equal(both[0], module.predict(3, seed=4, steps=3)[0])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "digits"
    assert main(["fit", "--config", str(CONFIG), "--run_dir", str(folder), *SMALL]) == 0
    return folder


def test_a_run_draws_equal_folders_and_leaves_others_alone(run, tmp_path, capsys):
    ask = ["predict", "--ckpt_path", str(run), "--data.number", "3", "--data.seed", "1"]
    for classes, name in (("3,7", "a"), ("[3,7]", "b")):
        assert main([*ask, "--data.classes", classes, "--output", str(tmp_path / name)]) == 0
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    drawn = [f"{c}/000{i}.png" for c in (3, 7) for i in range(3)]
    assert [*map(str, files)] == [*drawn, "grid.png", "images.json"]
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert apps.load(run).predict([7], seed=1)[0].size == (8, 8)
    assert "6 images of 3, 7" in capsys.readouterr().out
    for options, says in (
        (["--output", str(tmp_path / "x.csv")], "x.csv is a file, and this model draws images: give a folder"),
        (["--output", str(tmp_path / "c"), "--data.classes", "12"], "classes=12 is none of the model's 10 classes"),
    ):
        assert main([*ask, *options]) != 0
        assert says in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
    assert main([*ask, "--output", str(tmp_path / "a"), "--data.classes", "5", "--overwrite"]) == 0
    assert not (tmp_path / "a" / "3").exists()


def test_a_test_reports_figures_by_name(run, capsys):
    assert main(["test", "--ckpt_path", str(run), "--run_dir", str(run)]) == 0
    found = json.loads((run / "test.json").read_text())
    assert found["signatures"]["frechet"] == "in 19 principal components of pixels"  # of 20 images
    assert 0 <= found["test/precision"] <= 1
    assert found["test/frechet_of_training"] < found["test/frechet"]  # three steps learn nothing
    assert "Which expert takes a noise level, block 1" in (run / "report" / "sections.json").read_text()
    files = {p.name for p in (run / "report").iterdir()}
    assert {"classes.png", "steps.png", "nearest.png", "expert_level.png"} <= files


def test_the_service_answers_with_a_file_and_the_page_with_experts(run):
    model = apps.load(run)
    service = model.task.service()
    values = service.read({"class_name": "3", "seed": 5})
    (answer,) = service.predict([values])
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["image"]))))
    assert (image.shape, service.predict([values, values])) == ((8, 8), [answer, answer])
    shown = model.task.exhibit(None, 0).answer(["3", 5, 1.5])
    assert np.array_equal(shown.parts[0].images[0][1], image)
    ((patches,),) = shown.layers.values()
    assert patches.experts.shape == (2, 2, 2)


@pytest.mark.slow
def test_a_graph_of_one_step_draws_the_same_images(run, tmp_path):
    assert main(["export", "--ckpt_path", str(run), "--output", str(tmp_path / "step.onnx")]) == 0
    ask = ["predict", "--data.number", "2", "--data.classes", "3"]
    assert main([*ask, "--ckpt_path", str(run), "--output", str(tmp_path / "torch")]) == 0
    assert main([*ask, "--onnx", str(tmp_path / "step.onnx"), "--output", str(tmp_path / "onnx")]) == 0
    for name in ("3/0000.png", "3/0001.png"):
        one, other = (np.asarray(Image.open(tmp_path / kind / name), int) for kind in ("torch", "onnx"))
        assert np.abs(one - other).max() <= 1
    output(SCRIPT, str(tmp_path / "step.onnx"), "3", str(tmp_path / "3.png"))
    assert np.asarray(Image.open(tmp_path / "3.png")).shape == (8, 8)


def test_a_graph_and_the_documented_script_draw_what_the_model_does(run, tmp_path):
    model = apps.load(run)
    exported, graphs = reexported(model, tmp_path)
    ours, theirs = (one.predict([3], number=2, seed=1) for one in (model, exported))
    for one, other in zip(ours, theirs, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
    output_in_torch(SCRIPT, graphs, str(tmp_path / "model.onnx"), "3", str(tmp_path / "3.png"))
    assert np.asarray(Image.open(tmp_path / "3.png")).shape == (8, 8)
