"""``moesaic convert consolidate``: one file of a sharded checkpoint, with the state of the optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from apps.base.progress import each
from apps.convert.figures import Figures, Trial, counted
from apps.convert.options import Options
from apps.convert.runs import CONFIG, KEPT, WEIGHTS, Run, new_run
from apps.convert.streaming import fill, laid_out, sync
from apps.train.checkpoint import sharded
from apps.train.checkpoint.paths import NAMES, find_checkpoint, is_sharded
from apps.train.step.adapted import adapt_linears

ONE_PROCESS = {"strategy": "auto", "devices": 1, "num_nodes": 1}
"""Options of the trainer in the new run's configuration."""

_TENSORS = 16  # that are copied at a time


def consolidated(options: Options) -> tuple[Figures, Figures, Path]:
    """Write the run with one file, and return the figures before and after, and the file.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is a file already, or damaged; nothing is written.
        OSError: the new run cannot be written; nothing of it is left.
    """
    source = find_checkpoint(options.runs[0])
    if not is_sharded(source):
        raise ValueError(f"{source} is one file already")
    run = Run.read(source, options.config, shapes_only=True)
    if options.batches and run.config is None:
        raise ValueError(
            f"no config.yaml lies beside {source}, and the batches come from its data: give --config FILE, or "
            "--batches 0"
        )
    before = _figures(run, options, source, options.config)
    with new_run(options.output) as folder:
        name = source.name if source.stem in NAMES else WEIGHTS.name
        file = folder / WEIGHTS.parent / name
        write_whole(file, source)
        if run.config is not None:
            config = {k: v for k, v in run.config.items() if k not in ("ckpt_path", "run_dir")}
            config["trainer"] = {**(config.get("trainer") or {}), **ONE_PROCESS}
            text = yaml.safe_dump({"run_dir": str(options.output), **config}, sort_keys=False)
            (folder / CONFIG).write_text(text)
        after = _figures(run, options, file, folder / CONFIG)
    return before, after, options.output / WEIGHTS.parent / name


def write_whole(file: Path, source: Path) -> None:
    """Write one file of a sharded checkpoint. Beside the file, which is mapped, one part of a tensor is in memory.

    The file has everything that the checkpoint has, so that a training goes on from it in one process. TorchRec's
    tables are stepped by an optimizer that other processes do not have: of such a checkpoint it has the weights alone.

    Raises:
        ValueError: the checkpoint is damaged, or another program's.
        OSError: the file cannot be written.
    """
    rest = sharded.read_rest(source)
    saved = sharded.saved_tensors(source, rest)
    stepped_alone = any(name.startswith(sharded.WEIGHT) for name in saved)
    names = [name for name in saved if not name.startswith(sharded.STATE)]
    contents = sharded.plain(rest)
    if stepped_alone:
        contents = {k: v for k, v in contents.items() if k in (*KEPT, "state_dict", "hyper_parameters")}
        contents |= {"epoch": 0, "global_step": 0, "converted": "consolidate"}
        names = [name for name in names if sharded.place_of(name)[0] == "state_dict"]
    plain = sharded.plain(contents)
    for name in names:
        *keys, last = sharded.place_of(name)
        parent: Any = contents
        for key in keys:
            parent = parent[key]
        parent[last] = torch.empty(saved[name].size, dtype=saved[name].properties.dtype)
    mapped = laid_out(file, contents)
    fill(mapped, plain)
    # Each part is read for itself, which costs little beside its tensors.
    for start in each(range(0, len(names), _TENSORS), "copying the shards"):
        sharded.fill(source, rest, mapped, names[start : start + _TENSORS])
    sync(file)


def _figures(run: Run, options: Options, file: Path, config: Path | None) -> Figures:
    size = _num_bytes(run.checkpoint["state_dict"])
    if options.batches:
        return Trial(file, config, options.rest, options.batches).figures(size)
    outline = run.outline(run.arguments())
    adapt_linears(outline, run.checkpoint)
    return counted(outline, size)


def _num_bytes(state: Mapping[str, Any]) -> int:
    """Return the bytes of the tensors of a state, of which sharded ones have shapes alone."""
    return sum(math.prod(v.shape) * v.element_size() for v in state.values() if isinstance(v, Tensor))
