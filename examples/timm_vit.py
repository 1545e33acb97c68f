"""A Vision Transformer of timm is made sparse, and trained beside itself and its dense twin of equal FLOPs.

Without a file of weights it is trained first; without a folder the images are scikit-learn's digits:

    python examples/timm_vit.py
    python examples/timm_vit.py --model vit_tiny_patch16_224 --weights FILE --images FOLDER --size 224
"""

import argparse

import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2.functional import normalize, pil_to_tensor, resize

import core
from apps.report.intervals import mean_interval


def images_and_classes(folder: str | None, size: int) -> tuple[Tensor, Tensor]:
    """Return images (N, 3, size, size) between 0 and 1, and classes (N,), of a folder with one folder a class."""
    if folder is None:
        pixels, classes = load_digits(return_X_y=True)
        x = torch.tensor(pixels / 16).float().view(-1, 1, 8, 8).expand(-1, 3, -1, -1)
        return resize(x, [size, size]), torch.tensor(classes)
    images = ImageFolder(folder, lambda image: pil_to_tensor(resize(image, [size, size])) / 255)
    return torch.stack([image for image, _ in images]), torch.tensor(images.targets)


@torch.enable_grad()
def train(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    """Train a model in place on random batches of 64, the same ones for each model."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
    torch.manual_seed(1)
    for batch in torch.randint(len(x), (steps, 64)):
        with core.record(model) as tape:
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        (loss + core.aux_loss(tape)).backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="test_vit", help="name in timm; the default is its smallest ViT")
    parser.add_argument("--weights", help="file of pretrained weights")
    parser.add_argument("--images", help="folder with one folder of images a class")
    parser.add_argument("--size", type=int, default=64, help="height and width of the images")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    x, y = images_and_classes(args.images, args.size)
    weights = {"pretrained": True, "pretrained_cfg_overlay": {"file": args.weights}} if args.weights else {}
    dense = timm.create_model(args.model, img_size=args.size, num_classes=int(y.max()) + 1, **weights).eval()
    x = normalize(x, dense.pretrained_cfg["mean"], dense.pretrained_cfg["std"])
    test, rest = torch.randperm(len(x)).tensor_split([len(x) // 5])
    if not args.weights:
        train(dense, x[rest], y[rest], args.steps)
    moe = core.MoEConfig(8, core.TokenChoice(2), balance=core.Balance(load_balancing_loss=0.01))
    sparse = core.sparsify(dense, moe, modules="blocks.*.mlp")
    print(core.summary(sparse, x[:1]))
    right, expected = {}, dense(x[test])
    for name, model in {"sparse": sparse, "twin": core.dense_twin(dense, like=sparse), "dense": dense}.items():
        change = (model(x[test]) - expected).norm() / expected.norm()
        train(model, x[rest], y[rest], args.steps)
        right[name] = (model(x[test]).argmax(1) == y[test]).float() * 100
        print(f"{name}: changed by {change:.1e} at step 0; accuracy {right[name].mean():.1f} % at step {args.steps}")
    gain = mean_interval((right["sparse"] - right["twin"]).tolist())
    shown = "a difference" if gain.excludes_zero else "no difference"
    print(f"sparse minus twin: {gain.low:+.1f} to {gain.high:+.1f} points ({gain.count} images, 1 seed): {shown} shown")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
