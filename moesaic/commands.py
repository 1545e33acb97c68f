"""The commands as functions: each reads its arguments as the command line does, and runs the command's own code.

They print what the commands print. One runs at a time in a process: torch's seed, warnings and signals are global.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule

from apps import load
from apps.base.quiet import quiet
from apps.cli.errors import UsageError
from apps.cli.flags import SECTIONS, wants_text
from apps.cli.request import Request
from apps.cli.train import SparseCLI
from apps.compare.command import Outcome, run_command
from apps.compare.training import interruptible
from apps.train.checkpoint.checkpoints import BestAndLast
from apps.train.checkpoint.run_folder import is_unused, mark
from apps.verdict.command import give_verdict
from apps.verdict.options import VerdictOptions
from apps.verdict.result import Verdict
from core.config.plain import to_plain

__all__ = ["Predictions", "Result", "compare", "fit", "load", "predict", "test", "verdict"]

Part = str | Path | Mapping[str, object]
"""A configuration: a file's path, or what such a file holds."""
Config = Part | Sequence[Part]
"""One configuration, or several, of which a later one is laid over an earlier one."""
Overrides = Mapping[str, object]
"""Values by dotted option, such as ``{"model.optimizer.lr": 1e-3}``; configs such as ``core.TokenChoice(2)`` too.

``run_dir`` may be among them.
"""


@dataclass(frozen=True)
class Result:
    """What a training or a test ends with.

    Attributes:
        metrics: the last value of each logged metric by name, such as "val/top1" or "test/top1".
        run_dir: folder of the run. ``load`` takes it, and gives the best checkpoint's model.
        model: the module, of a training with the weights of its last step.
        best_score: best value of the metric that chooses checkpoints (the model's ``monitor``); None: there is none.
    """

    metrics: Mapping[str, float]
    run_dir: Path
    model: LightningModule
    best_score: float | None = None


@dataclass(frozen=True)
class Predictions:
    """A file of predictions.

    Attributes:
        file: the file.
        num_rows: number of predictions in it.
    """

    file: Path
    num_rows: int


def fit(
    config: Config = (),
    overrides: Overrides | None = None,
    *,
    run_dir: str | Path | None = None,
    ckpt_path: str | Path | None = None,
    weights: str | Path | None = None,
    overwrite: bool = False,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Train a model, as ``moesaic fit`` does.

    Args:
        config: the configuration, or several.
        overrides: values over the configuration's.
        run_dir: folder of the run; None: runs/<config name>.
        ckpt_path: "last", or a path: resumes from this checkpoint.
        weights: a run or a checkpoint with whose weights the training begins, never in that run's folder: without a
            ``config``, in runs/<name of the run>_tuned.
        overwrite: removes an earlier run in the folder.
        callbacks: callbacks for the trainer beside those of the configuration, such as one that reports each epoch.

    Raises:
        ValueError: a wrong option or value.
        FileNotFoundError: there is no such checkpoint.
    """
    options = {"run_dir": run_dir, "ckpt_path": ckpt_path, "weights": weights, "overwrite": overwrite}
    with _made("fit", config, overrides, options) as cli:
        cli.trainer.callbacks[:0] = callbacks  # type: ignore[attr-defined]
        cli.execute()
        scores = [c.best_score for c in cli.trainer.checkpoint_callbacks if isinstance(c, BestAndLast)]
        metrics = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
        return Result(metrics, cli.run_dir, cli.model, next(iter(scores), None))


def test(
    config: Config = (),
    overrides: Overrides | None = None,
    *,
    run_dir: str | Path | None = None,
    ckpt_path: str | Path | None = None,
    quantize: str | None = None,
    offload: str | None = None,
) -> Result:
    """Test a trained model on the test data, as ``moesaic test`` does, which writes ``test.json`` and a report.

    Args:
        config: the configuration, or several; none takes the one in the run's folder.
        overrides: values over the configuration's.
        run_dir: folder of the run; None: that of the checkpoint, else runs/<config name>.
        ckpt_path: "best", "last", "average", a run's folder or a checkpoint; None: what the run's folder means.
        quantize: how experts are quantized, such as "int8" or "int4:64".
        offload: how much of the experts is on the device, such as "0.5" or "64MB".

    Raises:
        ValueError: a wrong option or value.
        FileNotFoundError: there is no checkpoint.
    """
    options = {"run_dir": run_dir, "ckpt_path": ckpt_path, "quantize": quantize, "offload": offload}
    with _made("test", config, overrides, options) as cli:
        cli.execute()
        return Result(cli.metrics, cli.run_dir, cli.model)


def predict(
    config: Config = (),
    overrides: Overrides | None = None,
    *,
    run_dir: str | Path | None = None,
    ckpt_path: str | Path | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    quantize: str | None = None,
    offload: str | None = None,
) -> Predictions:
    """Write a trained model's predictions to a file, as ``moesaic predict --output`` does.

    For values in memory there is ``load(run).predict(...)``.

    Args:
        config: the configuration, or several; none takes the one in the run's folder.
        overrides: values over the configuration's.
        run_dir: folder of the run; None: that of the checkpoint, else runs/<config name>.
        ckpt_path: "best", "last", "average", a run's folder or a checkpoint; None: what the run's folder means.
        output: a file that ends in .jsonl, .csv, .parquet, or .txt for text; None: predictions.jsonl in ``run_dir``.
        overwrite: replaces an earlier file.
        quantize: how experts are quantized, such as "int8" or "int4:64".
        offload: how much of the experts is on the device, such as "0.5" or "64MB".

    Raises:
        ValueError: a wrong option or value.
        FileNotFoundError: there is no checkpoint.
    """
    run = {"run_dir": run_dir, "ckpt_path": ckpt_path, "quantize": quantize, "offload": offload}
    with _made("predict", config, overrides, {**run, "output": output, "overwrite": overwrite}) as cli:
        if output is None:
            own: Any = cli.request.options
            own = dataclasses.replace(own, output=cli.run_dir / "predictions.jsonl")
            cli.request = dataclasses.replace(cli.request, options=own)
            if is_unused(cli.run_dir):
                mark(cli.run_dir)
        cli.execute()
        assert cli.written is not None
        return Predictions(cli.written.path, cli.written.num_rows)


def compare(
    config: Config,
    overrides: Overrides | None = None,
    *,
    output: str | Path | None = None,
    seeds: int = 3,
    baselines: Sequence[str] | None = None,
    routers: Sequence[str] = (),
    learning_rates: Sequence[float] = (),
    search_share: float = 1.0,
    baseline_minutes: float = 1.0,
    rounds: int = 5,
    jobs: int = 1,
) -> Outcome:
    """Train the sparse model of a configuration and dense ones of equal cost, and compare them: ``moesaic compare``.

    Args:
        config: the configuration, or several.
        overrides: values over the configuration's.
        output: folder of the comparison; None: runs/compare/<config name>. A stopped one continues there.
        seeds: runs of each model.
        baselines: names of the models to train beside the sparse one; None: all, with ``routers`` none.
        routers: names or files of overlays whose routers are compared too.
        learning_rates: rates tried for each model; none: the configured one, a third and 3 times it.
        search_share: part of the training that a run of the search has.
        baseline_minutes: minutes in which boosted trees and the like search their settings.
        rounds: timed rounds of speed and memory; 0 measures nothing.
        jobs: runs at a time, each in a process that imports the script: with several, it needs
            ``if __name__ == "__main__":``.

    Returns:
        The numbers (``summary``), the folder and the files.

    Raises:
        ValueError: a wrong option or value, or a folder with another comparison.
    """
    options = {
        "output": output, "seeds": seeds, "baselines": baselines, "routers": routers or None,
        "learning_rates": learning_rates or None, "search_share": search_share,
        "baseline_minutes": baseline_minutes, "rounds": rounds, "jobs": jobs,
    }  # fmt: skip
    with _files(config) as paths:
        overlays = (f"--overlay={path}" for path in paths[1:])
        return run_command([*paths[:1], *overlays, *_words(options), *_flags(overrides)])


def verdict(
    data: str | Path | Sequence[str | Path],
    overrides: Overrides | None = None,
    *,
    minutes: float = 30.0,
    target: str | Sequence[str] = (),
    kind: str | None = None,
    exclude: Sequence[str] = (),
    time: str | None = None,
    user: str | None = None,
    output: str | Path | None = None,
    seed: int = 0,
) -> Verdict:
    """Say whether a sparse model pays on data, within a number of minutes, as ``moesaic verdict`` does.

    Args:
        data: a folder of images, a table, two text files, or a configuration.
        overrides: values over the configuration's.
        minutes: time that it may take.
        target: column of the table to predict, or several, for tasks of one model.
        kind: kind of the target; None: as its values are.
        exclude: columns of the table to leave out.
        time: splits the rows by this column, the last ones test.
        user: splits the rows by this column, each of its values in one split.
        output: folder of the verdict; None: runs/verdict/<name of the data>. A stopped one continues there.
        seed: first seed of the final runs.

    Raises:
        ValueError: wrong data or options, or a folder with another verdict.
    """
    options = {
        "minutes": minutes, "kind": kind, "exclude": exclude or None, "time": time, "user": user,
        "output": output, "seed": seed,
    }  # fmt: skip
    paths = [data] if isinstance(data, (str, Path)) else data
    targets = [target] if isinstance(target, str) else target
    words = [*map(str, paths), *(f"--target={column}" for column in targets), *_words(options), *_flags(overrides)]
    return give_verdict(VerdictOptions.read(words), shlex.join(["moesaic", "verdict", *words]))


@contextlib.contextmanager
def _made(command: str, config: Config, overrides: Overrides | None, options: Mapping[str, Any]) -> Iterator[SparseCLI]:
    """Yield what runs a command, with Lightning's advice left out, and signals as exceptions."""
    overrides = dict(overrides or {})
    if "run_dir" in overrides:
        if options["run_dir"] is not None:
            raise UsageError(f"run_dir={options['run_dir']} is also in overrides: give it once")
        options = {**options, "run_dir": overrides.pop("run_dir")}
    with _files(config) as paths, quiet(), interruptible():
        words = [*(f"--config={path}" for path in paths), *_words(options), *_flags(overrides)]
        yield SparseCLI(Request.read(command, words, announces=True))


@contextlib.contextmanager
def _files(config: Config) -> Iterator[list[str]]:
    """Yield the paths of the configurations; mappings are written to files that are removed in the end."""
    parts = [config] if isinstance(config, (str, Path, Mapping)) else config
    with contextlib.ExitStack() as stack:
        paths = []
        for part in parts:
            if isinstance(part, Mapping):
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="moesaic-"))
                path = Path(folder, "unnamed.yaml")
                path.write_text(_yaml(part), encoding="utf-8")
                part = path
            paths.append(str(part))
        yield paths


def _words(options: Mapping[str, Any]) -> list[str]:
    """Return options of a command as its words; without those that are None or False."""
    words: list[str] = []
    for name, value in options.items():
        if isinstance(value, (list, tuple)):
            words += [f"--{name}", *map(str, value)]
        elif value is not None and value is not False:
            words.append(f"--{name}" if value is True else f"--{name}={value}")
    return words


def _flags(overrides: Overrides | None) -> list[str]:
    """Return values by dotted option as words; a mapping or a config has a word for each of its values.

    Raises:
        UsageError: a key is no option of a configuration.
    """
    flags = [(key, item) for name, value in (overrides or {}).items() for key, item in _flat(name, _plain(value))]
    for key, _ in flags:
        if key.partition(".")[0] not in SECTIONS[:-1] or wants_text([f"--{key}"]):
            raise UsageError(f"overrides: {key} is no option of {', '.join(SECTIONS[:-1])}")
    return [f"--{key}={value if isinstance(value, str) else _yaml(value)}" for key, value in flags]


def _flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not (isinstance(value, Mapping) and value):
        yield key, value
        return
    if "class_path" in value:
        yield key, value["class_path"]
    for name, inner in value.items():
        if name != "class_path":
            yield from _flat(key if name == "init_args" else f"{key}.{name}", inner)


def _plain(value: Any) -> Any:
    """Return a value as plain ones; numbers of NumPy and configs too."""
    return json.loads(json.dumps(to_plain(value.item() if hasattr(value, "item") else value)))


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(_plain(value), default_flow_style=True, width=math.inf, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")
