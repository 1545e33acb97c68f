"""A folder of transformers, its runs, and the commands on them."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import torch
from chats import write
from safetensors.torch import load_file, save_file

from apps.cli import main
from apps.hub.data import HubBatch, HubTextData
from apps.hub.module import HubCausalLM

IDS = torch.arange(5, 25).view(2, 10)
CPU = ("--trainer.accelerator", "cpu")


def write_runs(base: Path) -> None:
    """Write a model with ``chats.write``, and a run of each configuration beside it, with what it said."""
    write(base)
    (base / "one.txt").write_text("What comes after 3?\n")
    for config in ("lora", "qlora", "finetune"):
        with contextlib.redirect_stderr(io.StringIO()) as said:
            assert fit(base, base / config, "--trainer.max_epochs", "2", config=config) == 0, said.getvalue()
        (base / config / "said.txt").write_text(said.getvalue())


def fit(folder: Path, run: Path, *flags: object, config: str = "lora") -> int:
    argv = ["fit", "--config", f"configs/hub/{config}.yaml", "--run_dir", run, *data_flags(folder), *CPU]
    return command(*argv, "--trainer.accumulate_grad_batches", 1, "--model.optimizer.lr", "0.005", *flags)


def data_flags(folder: Path, block_size: int = 48) -> list[object]:
    argv = ["--data.folder", folder / "model", "--data.root", folder, "--data.train_files", "chats.jsonl"]
    return [*argv, "--data.cache_dir", folder / "cache", "--data.block_size", block_size]


def command(*argv: object) -> int:
    return main([*map(str, argv)])


def failing(capsys: Any, *argv: object) -> str:
    """Return the one line of a command's error."""
    capsys.readouterr()
    assert command(*argv) == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    return line


def data(folder: Path, **options: Any) -> HubTextData:
    given = {"root": str(folder), "cache_dir": str(folder / "cache"), "train_files": "chats.jsonl", "block_size": 48}
    return HubTextData(str(folder / "model"), **{**given, "batch_size": 4, "eval_batch_size": 4, **options})


def rows(folder: Path, **options: Any) -> HubBatch:
    """Return the first row of the training data."""
    return data(folder, **options).examples("train")[0]


def module_of(folder: Path, **options: Any) -> HubCausalLM:
    return HubCausalLM(str(folder / "model"), **options)


@torch.no_grad()
def logits(model: Any) -> Any:
    return model(input_ids=IDS).logits


def error(own: torch.Tensor, other: torch.Tensor) -> float:
    return float((own - other).norm() / other.norm())


def rewritten(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Change values of a model's configuration, and its tensors."""
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | config))
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")
