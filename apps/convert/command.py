"""The command ``moesaic convert``: read a run, convert it, write the new one, and show both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

import core
from apps.base.progress import each
from apps.base.quiet import quiet
from apps.convert.figures import Figures, RunTrial, counted, table, weight_bytes
from apps.convert.folders import converted_of_hub, is_of_hub
from apps.convert.kinds import (
    BY_LOAD,
    KINDS,
    OneLayer,
    check_runs,
    fewer_experts,
    keep_of,
    one_for_all,
    one_of_many,
    part_of,
    with_fewer,
)
from apps.convert.options import ConvertOptions
from apps.convert.runs import (
    CONFIG,
    KEPT,
    WEIGHTS,
    ConversionRequest,
    TrainedRun,
    fill,
    laid_out,
    new_run,
    sync,
    write_run,
)
from apps.train.checkpoint import sharded
from apps.train.checkpoint.paths import NAMES, find_checkpoint, is_sharded
from apps.train.sparsified import SparsifyConfig, restored
from apps.train.step.adapted import adapt_linears
from core.config.plain import arguments_from_plain, from_plain, to_plain
from core.convert import SparseFFN, matching_parts, read_ffn


def own_figures(trial: RunTrial, num_bytes: int, metric: str | None) -> Figures:
    """Return the figures of a run whose steps are the user's: their FLOPs are not counted."""
    score = trial.validated(str(trial.cli.ckpt_path)).get(metric or "")
    return replace(counted(trial.model, num_bytes), score=score, metric=metric or "")


def own_statistics(trial: RunTrial, every_token: bool = False) -> dict[str, core.ExpertStatistics]:
    """Return the statistics of the experts over the validation, which ``figures`` has run before."""
    return core.expert_statistics(
        trial.model, [trial.cli.datamodule], lambda model, data: trial.validated(None), every_token=every_token
    )


def own_converted(kind: str, request: ConversionRequest) -> tuple[nn.Module, dict[str, Any]]:
    """Return the new module, and the section ``sparsify`` of its checkpoint and its configuration, if it has one.

    Raises:
        ValueError: the conversion is not for such a run, or its layers become no networks of the user's module.
    """
    run, sparse = request.run, request.module
    layers = {name: m for name, m in sparse.named_modules() if isinstance(m, SparseFFN)}
    if kind == "prune" or getattr(request.options, "keep", None) is not None:
        fewer = fewer_experts(request)
        constants = bool(getattr(request.options, "constants", False))
        configs = [with_fewer(m.config, m.moe, keep_of(request, m.moe), constants) for m in layers.values()]
        if any(config != configs[0] for config in configs):
            raise ValueError(f"the networks of {run.file} differ in width: prune them in a script, core.prune_experts")
        for name, layer in layers.items():
            fewer(f"{name}.moe", layer.moe)
        section = from_plain(run.checkpoint["sparsify"], SparsifyConfig, f"{run.file}: sparsify")
        section = replace(section, moe=configs[0], start="random", noise=0.0, seed=0, exact=False)
        return sparse, {"sparsify": to_plain(section, SparsifyConfig)}
    if kind not in ("densify", "specialize"):
        raise ValueError(f"{run.file} is of a model of your own, which densify, prune and specialize take, not {kind}")
    one = one_for_all(request) if kind == "densify" else one_of_many(request)
    return _dense(request, layers, one), {}


@torch.no_grad()
def _dense(request: ConversionRequest, layers: dict[str, SparseFFN], one: OneLayer) -> nn.Module:
    """Return the user's dense module, with one expert's weights in each network that was made sparse."""
    run, checkpoint = request.run, request.run.checkpoint
    arguments = checkpoint.get("hyper_parameters") or {}
    dense: nn.Module = run.kind(**arguments_from_plain(run.kind, arguments, f"{run.file}: model"))
    section = from_plain(checkpoint["sparsify"], SparsifyConfig, f"{run.file}: sparsify")
    dense.load_state_dict(run.state, strict=False)
    for name, part in matching_parts(dense, section.modules).items():
        place = ".".join(filter(None, (name, part.at)))
        source = read_ffn(one(f"{place}.moe", layers[place].moe).feed_forward())
        if source is None or source.expert != part.expert:
            expert = "no feed-forward network" if source is None else source.expert
            raise ValueError(f"module {name!r} is {part.expert} in the dense model, and its layer becomes {expert}")
        for key, value in part.weights.items():  # views of the network's own tensors
            value.copy_(source.weights[key])
    return dense


ONE_PROCESS = {"strategy": "auto", "devices": 1, "num_nodes": 1}
"""Options of the trainer in the new run's configuration."""

_TENSORS = 16  # that are copied at a time


def consolidated(options: ConvertOptions) -> tuple[Figures, Figures, Path]:
    """Write the run with one file, and return the figures before and after, and the file.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        ValueError: it is a file already, or damaged; nothing is written.
        OSError: the new run cannot be written; nothing of it is left.
    """
    source = find_checkpoint(options.runs[0])
    if not is_sharded(source):
        raise ValueError(f"{source} is one file already")
    run = TrainedRun.read(source, options.config, shapes_only=True)
    run.check_data(options.batches)
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
    """Write one file of a sharded checkpoint. Besides the file, which is mapped, one part of a tensor is in memory.

    The file has everything that the checkpoint has, so that a training resumes from it in one process. TorchRec's
    tables are updated by an optimizer that other processes do not have: of such a checkpoint it has only the weights.

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
    # Each part is read for itself, which costs little next to its tensors.
    for start in each(range(0, len(names), _TENSORS), "copying the shards"):
        sharded.fill(source, rest, mapped, names[start : start + _TENSORS])
    sync(file)


def _figures(run: TrainedRun, options: ConvertOptions, file: Path, config: Path | None) -> Figures:
    size = _num_bytes(run.checkpoint["state_dict"])
    if options.batches:
        return RunTrial(file, config, options.rest, options.batches).figures(size)
    outline = run.outline(run.arguments())
    adapt_linears(outline, run.checkpoint)
    return counted(outline, size)


def _num_bytes(state: Mapping[str, Any]) -> int:
    """Return the bytes of the tensors of a state, of which sharded ones have only shapes."""
    return sum(math.prod(v.shape) * v.element_size() for v in state.values() if isinstance(v, Tensor))


def run(options: ConvertOptions) -> int:
    """Run the conversion and print its table."""
    if options.kind == "consolidate":
        with quiet():
            before, after, file = consolidated(options)
        print(table(before, after))
        print(f"{options.output}: moesaic test --ckpt_path {file} tests it, and fit continues with it in one process")
        return 0
    with quiet():
        into_folder = is_of_hub(options.runs[0])
        before, after = (converted_of_hub if into_folder else convert)(options)
    print(table(before, after))
    if options.kind == "quantize":
        print(f"{options.output}: moesaic test --ckpt_path {options.output} tests it")
        return 0
    if into_folder:
        print(f"{options.output}: a folder of transformers, which --data.folder {options.output} reads")
        return 0
    config = "" if options.config is None else f" --config {options.output / CONFIG}"
    print(f"{options.output}: moesaic fit --weights {options.output}{config} trains it on")
    return 0


def convert(options: ConvertOptions) -> tuple[Figures, Figures]:
    """Write the converted run, and return the figures before and after.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        ValueError: the run cannot be converted so; nothing is written.
        OSError: the new run cannot be written; nothing of it is left.
    """
    first, *others = (TrainedRun.read(path, options.config) for path in options.runs)
    check_runs(options.kind, options, (first, *others))
    first.check_data(options.batches)
    if first.is_own:
        return convert_own(options, first)
    num_bytes = weight_bytes(first.state)
    statistics = None
    module = first.mapped()
    if options.batches:
        trial = RunTrial(first.file, options.config, options.rest, options.batches)
        before = trial.figures(num_bytes)
        if _needs_statistics(options):
            pair = getattr(options, "pair", None)
            merges = bool(getattr(options, "merge", False))
            statistics = trial.statistics(None if pair is None else part_of(module, pair).select, merges)
        del trial
    else:
        before = counted(first.outline(first.arguments(), first.checkpoint), num_bytes)
    request = ConversionRequest(first, module, options, statistics, tuple(others))
    conversion = KINDS[options.kind](request)
    outline = first.outline(conversion.arguments, conversion.extra)
    layout = conversion.layout(first, outline)
    with new_run(options.output) as folder:
        file = write_run(
            folder,
            first,
            conversion.arguments,
            layout,
            conversion.values(first.state),
            data=conversion.data,
            extra={**conversion.extra, "converted": options.kind},
            run_dir=options.output,
        )
        # It is read as any other run before it has its name.
        new_bytes = weight_bytes(layout)
        if options.batches:
            after = RunTrial(file, folder / CONFIG, options.rest, options.batches).figures(new_bytes)
        else:
            after = counted(outline, new_bytes)
    return before, after


def convert_own(options: ConvertOptions, run: TrainedRun) -> tuple[Figures, Figures]:
    """Write the converted run of a user's own module, and return the figures before and after; as ``convert``."""
    module = restored(run.kind, run.checkpoint, run.file)
    metric, statistics = getattr(module, "monitor", None), None
    before = counted(module, weight_bytes(run.state))
    if options.batches:
        trial = RunTrial(run.file, options.config, options.rest, options.batches)
        before = own_figures(trial, before.bytes, metric)
        if _needs_statistics(options):
            statistics = own_statistics(trial, bool(getattr(options, "merge", False)))
    new, section = own_converted(options.kind, ConversionRequest(run, module, options, statistics))
    with new_run(options.output) as folder:
        layout = {name: value for name, value in new.state_dict().items() if isinstance(value, Tensor)}
        extra = {**section, "converted": options.kind}
        file = write_run(folder, run, None, layout, layout.items(), data={}, extra=extra, run_dir=options.output)
        after = counted(new, weight_bytes(layout))
        if options.batches:
            after = own_figures(RunTrial(file, folder / CONFIG, options.rest, options.batches), after.bytes, metric)
    return before, after


def _needs_statistics(options: ConvertOptions) -> bool:
    """Return whether a conversion reads how the experts are used."""
    by_use = getattr(options, "how", None) in BY_LOAD
    return by_use or getattr(options, "keep", None) is not None
