"""A run on the first batches of its validation data, as ``moesaic validate`` makes both, for other commands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from apps.cli.train import SparseCLI, build
from apps.registry import OF_FOLDER
from apps.train.checkpoint.paths import is_hub_folder

_QUIET = (
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.num_nodes=1",
    "--trainer.strategy=auto",
    "--trainer.logger=false",
    "--compile=false",
)


def build_trial(checkpoint: Path, config: Path | None, batches: int, options: Sequence[str] = ()) -> SparseCLI:
    """Return a quiet validation of a run on the CPU: its trainer, data and model, which is not loaded yet.

    Args:
        checkpoint: the run's checkpoint, or a folder of transformers, whose model has its weights at once.
        config: configuration, if the checkpoint has none next to it.
        batches: number of validation batches.
        options: further words of the command line.

    Raises:
        ValueError: the model or the data are rejected.
    """
    words = [] if config is None else ["--config", str(config)]
    if is_hub_folder(checkpoint):
        model, data = OF_FOLDER
        words += ["--model", model, "--data", data, "--data.folder", str(checkpoint), "--ckpt_path", "none"]
    else:
        words += ["--ckpt_path", str(checkpoint)]
    limit = f"--trainer.limit_val_batches={batches}"
    cli = build("validate", [*words, *_QUIET, limit, *options])
    cli.model.reports = False
    return cli
