"""Print the price of ``RoutingDoctor``: the CPU time of its hooks over that of the rest of a training.

    python -m benchmarks.doctor --config configs/vision/digits.yaml --trainer.max_epochs 4

The arguments are those of ``moesaic fit``. The run goes to a folder that is deleted. CPU time, and not the clock's,
since a busy machine stretches both; work is on the CPU, in one thread.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from apps.base.quiet import quiet
from apps.cli.train import build
from apps.train.watch.doctor import RoutingDoctor


class TimedDoctor(RoutingDoctor):
    """A ``RoutingDoctor`` that adds up the CPU time of its hooks.

    Attributes:
        seconds: the sum, in seconds.
    """

    seconds = 0.0


def _timed(name: str) -> Callable[..., Any]:
    def hook(self: TimedDoctor, *args: Any, **kwargs: Any) -> Any:
        start = time.thread_time()
        try:
            return getattr(RoutingDoctor, name)(self, *args, **kwargs)
        finally:
            self.seconds += time.thread_time() - start

    return hook


for _name in vars(RoutingDoctor):
    if _name.startswith("on_"):
        setattr(TimedDoctor, _name, _timed(_name))


def main(argv: Sequence[str] | None = None) -> int:
    """Train, and print the share."""
    torch.set_num_threads(1)
    words = list(sys.argv[1:] if argv is None else argv)
    with tempfile.TemporaryDirectory() as folder, quiet():
        cli = build("fit", [*words, "--run_dir", f"{folder}/run", "--trainer.accelerator=cpu"])
        doctor = TimedDoctor()
        cli.trainer.callbacks.append(doctor)
        start = time.thread_time()
        cli.execute()
        whole = time.thread_time() - start
    rest = whole - doctor.seconds
    print(f"RoutingDoctor: {doctor.seconds:.3f} s over {rest:.2f} s of the training, {doctor.seconds / rest:.2%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
