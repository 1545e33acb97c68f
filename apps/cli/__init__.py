"""The command ``moesaic``: finds the command, runs it, and turns what goes wrong into one line.

Nothing heavy is imported here: ``moesaic --help`` answers at once.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence

from apps.train.checkpoint_paths import MEANING, NAMES

_TRAINING = {
    "fit": "train a model; --ckpt_path last goes on where a run was stopped",
    "validate": "the metrics of a checkpoint on the validation data",
    "test": "the metrics of a checkpoint on the test data, and a report as one HTML file",
    "predict": "the outputs of a checkpoint, into a file",
}
_OTHERS = {
    "compare": ("apps.compare", "train sparse and dense models of equal cost, and compare them"),
    "verdict": ("apps.verdict", "does sparse pay on your data? an answer within a number of minutes"),
    "convert": ("apps.convert", "make a trained run sparse, dense, smaller, or several runs one"),
    "doctor": ("apps.doctor", "what is wrong with a run's routing, with the evidence and a remedy"),
    "export": ("apps.serve.export", "write a trained model as a graph for onnxruntime, torch.export or AOTInductor"),
    "demo": ("apps.demonstrate", "try a trained model out on a page on this machine, with its experts at work"),
    "serve": ("apps.serve.service", "a trained model behind a URL: HTTP, batches, metrics, OpenAPI"),
    "plan": ("apps.plan", "memory, traffic and time of a training on many GPUs, from its configuration alone"),
    "bench": ("apps.bench", "measure the speed of a layer on this machine"),
    "data": ("apps.cli.data", "list the datasets, or fetch one"),
}

RUN_OPTIONS = (
    ("config FILE", "", "a configuration; may be given again: a later file overrides an earlier one"),
    ("KEY.SUBKEY VALUE", "", "any value in it, such as --data.batch_size 64 or --model.moe.num_experts 4"),
    ("run_dir DIR", "runs/<config name>", "where logs, checkpoints and the configuration go"),
    ("ckpt_path WHICH", "", f"{', '.join(NAMES)}, or {MEANING}; fit goes on from it"),
    ("weights RUN", "", "fit begins anew with the weights of another run; --run_dir is the new one's"),
    ("seed_everything N", "0", "seed of weights, order and transforms"),
    ("trainer.max_epochs N", "", "and whatever else Lightning's Trainer takes"),
    ("print_config", "", "print the whole configuration, with the defaults in force, and run nothing"),
    (
        "help_all [SECTION]",
        "",
        "every option, or those of run, trainer, model or data; --config FILE says of which model",
    ),
    ("model.help [CLASS]", "", "the options of a model, such as VisionClassifier; --data.help likewise"),
    ("traceback", "", "in case of an error, show where in the code"),
)
"""Options of the training commands: their names without the dashes, their defaults, what they mean."""
_QUANTIZE = (
    "quantize int8|int4[:GROUP]",
    "",
    "quantise the experts; GROUP inputs share a scale, else all",
)
_OFFLOAD = (
    "offload SIZE[:FILE]",
    "",
    "keep the experts in memory or FILE, and SIZE of them on the device: 64MB, or a share such as 0.5",
)
_PREDICT_OPTIONS = (
    ("output FILE", "predictions.jsonl in the run's folder", ".jsonl, .csv, .parquet, or .txt for lines of text"),
    ("overwrite", "", "replace an earlier FILE"),
    ("raw_csv", "", "write no apostrophe before text that a spreadsheet would compute, such as =1+1"),
    ("onnx PATH", "", "an ONNX file or folder of moesaic export in place of --ckpt_path"),
    _QUANTIZE,
    _OFFLOAD,
)
_FIT_OPTIONS = (("overwrite", "", "remove the run in the folder, which else moves to a numbered folder in earlier"),)
_TEST_OPTIONS = (
    ("open", "", "show the report in the browser"),
    ("sweep", "", "test cheaper forms of the model as well: quality against latency and memory"),
    ("rounds N", "11", "rounds in which --sweep times a form and the trained model in turn"),
    ("batches N", "8", "validation batches in which --sweep counts the use of the experts"),
    _QUANTIZE,
    _OFFLOAD,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``moesaic ARGV``.

    Returns:
        0; 1 for what goes wrong while running, 2 for wrong usage, 130 for an interrupt, 143 for a termination. Each of
        these prints one line to stderr, and no traceback without ``--traceback``.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in args
    args = [a for a in args if a != "--traceback"]
    try:
        check_core()
        return _dispatch(args)
    except (KeyboardInterrupt, SystemExit) as stop:
        advice = "; --ckpt_path last goes on from the last checkpoint, if there is one"
        return stopped(stop, "" if args[:1] == ["predict"] else advice)
    except BrokenPipeError:  # such as `moesaic data list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return failed(error, show_traceback)


def stopped(stop: BaseException, advice: str) -> int:
    """Return the exit code of a command that a signal or an exit has ended; a signal is named, with ``advice``."""
    if isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt):
        how, code = "interrupted", 130  # Lightning turns an interrupt into exit(1)
    elif type(stop).__name__ == "SIGTERMException":  # Lightning's; pre-emption and ``timeout`` send SIGTERM
        how, code = "terminated", 143
    else:
        code = getattr(stop, "code", 1)
        return code if isinstance(code, int) else 0 if code is None else 1
    print(f"\n{how}{advice}", file=sys.stderr)
    return code


def failed(error: Exception, show_traceback: bool) -> int:
    """Print what went wrong as one line, and return the exit code."""
    from apps.cli.errors import describe

    if show_traceback:
        traceback.print_exception(error)
    line, code = describe(error)
    print(f"error: {line}", file=sys.stderr)
    return code


class UsageError(ValueError):
    """The command line or a configuration is wrong."""


def check_core() -> None:
    """Raise a ``UsageError`` where another package named ``core`` on PYTHONPATH comes before the engine."""
    spec = importlib.util.find_spec("core")
    folders = [os.path.realpath(p) for p in (spec and spec.submodule_search_locations) or ()]
    own = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__)))), "core")
    if own not in folders:
        other = (spec and spec.origin) or (folders or ["none at all"])[0]
        raise UsageError(f"the package core must be {own}, and Python finds {other}: take that one off PYTHONPATH")


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    command, rest = args[0], args[1:]
    if command == "--version":
        from importlib.metadata import version

        print(f"moesaic {version('moesaic')}")
        return 0
    if command in _TRAINING:
        if rest in (["-h"], ["--help"]):
            print(_training_help(command))
            return 0
        from apps.base.imports import importing

        with importing():
            from apps.base.quiet import quiet
            from apps.cli.request import Request

            with quiet():  # libraries talk when a model's class is imported
                request = Request.read(command, rest, announce=lambda line: announce(command, line))
        if "--help_all" in rest or any(".help" in flag for flag in rest):
            from apps.cli.help import show
            from apps.cli.train import TRAINER_DEFAULTS

            if show(request, TRAINER_DEFAULTS):
                return 0
        from apps.cli.train import run

        return run(request)
    if command in _OTHERS:
        from apps.cli.classes import load_class
        from apps.cli.configs import own_classes

        for path in own_classes(rest):
            load_class(path)
        return int(importlib.import_module(_OTHERS[command][0]).main(rest))
    names = [*_TRAINING, *_OTHERS]
    near = difflib.get_close_matches(command, names, n=1)
    suggestion = f"; did you mean {near[0]!r}?" if near else ""
    raise UsageError(f"{command!r} is not one of {', '.join(names)}{suggestion}")


def _training_help(command: str) -> str:
    own = {"fit": _FIT_OPTIONS, "predict": _PREDICT_OPTIONS, "test": _TEST_OPTIONS}.get(command, ())
    rows = [*RUN_OPTIONS[:4], *own, *RUN_OPTIONS[4:]]
    lines = [f"usage: moesaic {command} --config FILE [options]", "", _TRAINING[command], "", "options:"]
    for name, default, meaning in rows:
        lines.append(f"  --{name:<22}{meaning}{f' (default: {default})' if default else ''}")
    return "\n".join(lines)


def announce(command: str, line: str) -> None:
    """Say what starts, before the seconds that torch takes. The stdout of predict is for what it predicts."""
    ranks = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    if all(rank == "0" for rank in ranks):  # the processes of a distributed run have one command line
        print(line, file=sys.stderr if command == "predict" else None, flush=True)


def _help() -> str:
    lines = ["usage: moesaic COMMAND [options]", "", "Mixture-of-experts models on PyTorch.", "", "commands:"]
    others = {name: text for name, (_, text) in _OTHERS.items()}
    lines += [f"  {name:<10}{text}" for name, text in {**_TRAINING, **others}.items()]
    lines += ["", "`moesaic COMMAND --help` tells more. To begin:", ""]
    lines += ["  moesaic fit --config configs/vision/digits.yaml", "  moesaic test --config configs/vision/digits.yaml"]
    return "\n".join(lines)
