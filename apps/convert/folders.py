"""A folder of transformers with fewer experts, merged ones or one: read, converted and written in its own layout."""

from __future__ import annotations

from typing import Any

import core
from apps.convert.figures import Figures, Trial, counted, weight_bytes
from apps.convert.kinds import BY_LOAD
from apps.convert.options import Options
from apps.registry import OF_FOLDER, resolve


def converted_folder(options: Options) -> tuple[Figures, Figures]:
    """Write the converted model in transformers' layout, and return the figures before and after.

    Raises:
        ValueError: another kind of conversion, a folder that cannot be read, a dense model, or statistics without
            batches; nothing is written.
        OSError: the folder cannot be written; nothing of it is left.
    """
    folder, own = options.runs[0], vars(options)
    if options.kind not in ("prune", "densify"):
        raise ValueError(f"{folder} is a folder of transformers, which prune and densify take, not {options.kind}")
    needs_use = options.kind == "prune" or own["how"] in BY_LOAD
    if needs_use and not options.batches:
        raise ValueError("--batches 0 leaves no statistics of the experts, which this conversion reads")
    trial = Trial(folder, options.config, options.rest, options.batches) if options.batches else None
    module: Any = resolve(OF_FOLDER[0])(str(folder)) if trial is None else trial.model
    if not core.moe_layers(module):
        raise ValueError(f"{folder} is a dense model: it has no experts")
    before = _figures(module, trial)
    statistics = trial.statistics(None, bool(own.get("merge"))) if trial is not None and needs_use else None
    if options.kind == "densify":
        loads = None if statistics is None else {name: s.loads_E for name, s in statistics.items()}
        core.densify(module, own["how"], loads)
    elif own["merge"]:
        core.merge_experts(module, statistics, own["keep"])  # type: ignore[arg-type]
    else:
        core.prune_experts(module, statistics, own["keep"], own["by"], constants=own["constants"])  # type: ignore[arg-type]
    after = _figures(module, trial)
    module.save_folder(options.output)
    return before, after


def _figures(module: Any, trial: Trial | None) -> Figures:
    size = weight_bytes(module.model.state_dict())
    return counted(module.model, size) if trial is None else trial.figures(size)
