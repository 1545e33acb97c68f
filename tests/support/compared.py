"""The configuration that the tests of comparisons share, and functions that read it."""

from __future__ import annotations

import json
from pathlib import Path

from apps.compare.experiment import Experiment, arguments

# E=4, K=2, F=8 at D=8. Router 2*8*4 = 64 FLOPs a token, experts 2 * 4*8*8 = 512: 576. Dense F = 576 / 32 = 18.
# Parameters: router 32, experts 4 * 2*8*8 = 512: 544. Dense F = 544 / 16 = 34.
CONFIG = """
model:
  class_path: compare_app.TinyModel
  init_args:
    moe:
      num_experts: 4
      expert: {class_path: core.FFN, init_args: {hidden_dim: 8}}
    optimizer: {lr: 0.01}
data: {class_path: compare_app.TinyData}
trainer: {max_epochs: 2, accelerator: cpu}
"""


def asked(config: Path, output: Path, *more: str) -> list[str]:
    """Return the words of a command that compares with two seeds of one epoch, at one rate, and measures no speed."""
    fixed = ["--seeds", "2", "--rounds", "0", "--learning_rates", "0.01", "--trainer.max_epochs", "1"]
    return ["compare", str(config), "--output", str(output), *fixed, *more]


def experiment(config: Path, *rest: str) -> Experiment:
    return Experiment(arguments(config, [], rest))


def overlay(path: Path, kind: str = "TokenChoice", **options: object) -> str:
    router = {"class_path": f"core.{kind}", "init_args": options}
    path.write_text(json.dumps({"model": {"init_args": {"moe": {"router": router}}}}))
    return str(path)


def offers(*names: str) -> tuple[str, str]:
    return "--model.offers", json.dumps(list(names))
