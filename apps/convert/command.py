"""The whole of ``moesaic convert``: read a run, convert it, write the new one, and show both."""

from __future__ import annotations

from torch import Tensor

from apps.base.quiet import quiet
from apps.convert import own
from apps.convert.consolidate import consolidated
from apps.convert.conversion import Request
from apps.convert.figures import Figures, Trial, counted, table, weight_bytes
from apps.convert.kinds import BY_LOAD, KINDS, check_runs, part_of
from apps.convert.options import Options
from apps.convert.runs import CONFIG, Run, new_run, write_run
from apps.train.sparsified import restored


def run(options: Options) -> int:
    """Run the conversion and print its table."""
    if options.kind == "consolidate":
        with quiet():
            before, after, file = consolidated(options)
        print(table(before, after))
        print(f"{options.output}: moesaic test --ckpt_path {file} tests it, and fit goes on with it in one process")
        return 0
    with quiet():
        before, after = convert(options)
    print(table(before, after))
    config = "" if options.config is None else f" --config {options.output / CONFIG}"
    print(f"{options.output}: moesaic fit --weights {options.output}{config} --run_dir NEW trains it on")
    return 0


def convert(options: Options) -> tuple[Figures, Figures]:
    """Write the converted run, and return the figures before and after.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the run cannot be converted so; nothing is written.
        OSError: the new run cannot be written; nothing of it is left.
    """
    first, *others = (Run.read(path, options.config) for path in options.runs)
    check_runs(options.kind, options, (first, *others))
    if options.batches and first.config is None:
        raise ValueError(
            f"no config.yaml lies beside {first.file}, and the batches come from its data: give --config FILE, or "
            "--batches 0"
        )
    if first.is_own:
        return convert_own(options, first)
    num_bytes = weight_bytes(first.state)
    statistics = None
    module = first.mapped()
    if options.batches:
        trial = Trial(first.file, options.config, options.rest, options.batches)
        before = trial.figures(num_bytes)
        if _needs_statistics(options):
            pair = getattr(options, "pair", None)
            merges = bool(getattr(options, "merge", False))
            statistics = trial.statistics(None if pair is None else part_of(module, pair).select, merges)
        del trial
    else:
        before = counted(first.outline(first.arguments(), first.checkpoint), num_bytes)
    request = Request(first, module, options, statistics, tuple(others))
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
            after = Trial(file, folder / CONFIG, options.rest, options.batches).figures(new_bytes)
        else:
            after = counted(outline, new_bytes)
    return before, after


def convert_own(options: Options, run: Run) -> tuple[Figures, Figures]:
    """Write the converted run of a user's own module, and return the figures before and after; as ``convert``."""
    module = restored(run.kind, run.checkpoint, run.file)
    metric, statistics = getattr(module, "monitor", None), None
    before = counted(module, weight_bytes(run.state))
    if options.batches:
        trial = Trial(run.file, options.config, options.rest, options.batches)
        before = own.figures(trial, before.bytes, metric)
        if _needs_statistics(options):
            statistics = own.statistics(trial, bool(getattr(options, "merge", False)))
    new, section = own.converted(options.kind, Request(run, module, options, statistics))
    with new_run(options.output) as folder:
        layout = {name: value for name, value in new.state_dict().items() if isinstance(value, Tensor)}
        extra = {**section, "converted": options.kind}
        file = write_run(folder, run, None, layout, layout.items(), data={}, extra=extra, run_dir=options.output)
        after = counted(new, weight_bytes(layout))
        if options.batches:
            after = own.figures(Trial(file, folder / CONFIG, options.rest, options.batches), after.bytes, metric)
    return before, after


def _needs_statistics(options: Options) -> bool:
    """Return whether a conversion reads how the experts are used."""
    by_use = getattr(options, "how", None) in BY_LOAD
    return by_use or getattr(options, "keep", None) is not None
