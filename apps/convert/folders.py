"""A model of transformers, of a folder or of a run: converted and written as a folder in its layout, or quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import core
from apps.convert.figures import Figures, RunTrial, counted, weight_bytes
from apps.convert.kinds import BY_LOAD
from apps.convert.options import ConvertOptions
from apps.convert.runs import CONFIG, TrainedRun, new_run, write_run
from apps.registry import OF_FOLDER, full_path, resolve
from apps.train.checkpoint.contents import read_checkpoint
from apps.train.checkpoint.loading import load
from apps.train.checkpoint.paths import find_checkpoint, is_hub_folder
from apps.train.cost.quantizing import quantize_model


def is_of_hub(path: Path) -> bool:
    """Return whether a path is a folder of transformers, or a run of a model that was read from one."""
    if is_hub_folder(path):
        return True
    kind = read_checkpoint(find_checkpoint(path), shapes_only=True).get("module_class")
    return isinstance(kind, str) and full_path(kind) == full_path(OF_FOLDER[0])


def converted_of_hub(options: ConvertOptions) -> tuple[Figures, Figures]:
    """Write the converted model in transformers' layout, or a run with quantized experts, and return the figures before
    and after.

    Raises:
        ValueError: another kind of conversion, a folder that cannot be read, a dense model, or statistics without
            batches; nothing is written.
        OSError: the folder cannot be written; nothing of it is left.
    """
    (source, *others), own = options.runs, vars(options)
    what = f"{source} is a {'folder of transformers' if is_hub_folder(source) else 'run of a model of transformers'}"
    if options.kind == "quantize":
        if is_hub_folder(source):
            raise ValueError(
                f"{what}, whose layout has no experts in {own['how']}: serve and export take --quantize {own['how']}, "
                "and configs/hub/qlora.yaml tunes it"
            )
        return _quantized_run(options)
    kinds = ("prune", "densify") if is_hub_folder(source) else ("prune", "densify", "merge", "quantize")
    if options.kind not in kinds or others:
        raise ValueError(f"{what}: {', '.join(kinds)} take one, not {options.kind}")
    needs_use = options.kind == "prune" or own["how"] in BY_LOAD
    if needs_use and not options.batches:
        raise ValueError("--batches 0 leaves no statistics of the experts, which this conversion reads")
    trial = RunTrial(source, options.config, options.rest, options.batches) if options.batches else None
    module: Any = load(source) if trial is None else trial.model
    if not core.moe_layers(module) and options.kind != "merge":
        raise ValueError(f"{source} is a dense model: it has no experts")
    before = _figures(module, trial)
    statistics = trial.statistics(None, bool(own.get("merge"))) if trial is not None and needs_use else None
    if module.lora is not None:
        module.merge_adapters()
    if options.kind == "densify":
        loads = None if statistics is None else {name: s.loads_E for name, s in statistics.items()}
        core.densify(module, own["how"], loads)
    elif options.kind == "prune" and own["merge"]:
        core.merge_experts(module, statistics, own["keep"])  # type: ignore[arg-type]
    elif options.kind == "prune":
        core.prune_experts(module, statistics, own["keep"], own["by"], constants=own["constants"])  # type: ignore[arg-type]
    if trial is not None:
        trial.cli.ckpt_path = None  # its weights are in the model
    after = _figures(module, trial)
    module.save_folder(options.output)
    return before, after


def _quantized_run(options: Any) -> tuple[Figures, Figures]:
    """Write a run with quantized experts. With adapters the experts are the folder's, quantized when they are read."""
    run = TrainedRun.read(options.runs[0], options.config)
    run.check_data(options.batches)
    arguments: Any = run.arguments()
    if "quantized" in run.checkpoint:
        raise ValueError(f"{run.file} has experts in {run.checkpoint['quantized']} already")
    before = _figures(load(run.file), _trial(options, run.file, options.config))
    if arguments.get("lora") is None:
        arguments, layout = None, quantize_model(load(run.file), options.how).state_dict()
    else:
        arguments, layout = {**arguments, "quantize": options.how}, run.state
        resolve(OF_FOLDER[0])(**arguments)  # rejects what cannot be quantized
    extra = {"quantized": options.how, "converted": options.kind}
    with new_run(options.output) as folder:
        file = write_run(folder, run, arguments, layout, layout.items(), data={}, extra=extra, run_dir=options.output)
        after = _figures(load(file), _trial(options, file, folder / CONFIG))
    return before, after


def _trial(options: ConvertOptions, file: Path, config: Path | None) -> RunTrial | None:
    return RunTrial(file, config, options.rest, options.batches) if options.batches else None


def _figures(module: Any, trial: RunTrial | None) -> Figures:
    size = weight_bytes(module.model.state_dict())
    return counted(module.model, size) if trial is None else trial.figures(size)
