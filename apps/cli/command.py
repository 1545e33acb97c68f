"""``moesaic``: finds the command, runs it, and turns an error into one line.

Nothing heavy is imported here: ``moesaic --help`` answers at once.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from apps.base.packages import shadowed
from apps.cli.errors import UsageError, failed, stopped
from apps.cli.options import COMMANDS

_OTHERS = {
    "init": ("apps.init", "look at your data, and write a first configuration with comments"),
    "compare": ("apps.compare", "train sparse and dense models of equal cost, and compare them"),
    "verdict": ("apps.verdict", "does sparse pay on your data? an answer within a number of minutes"),
    "convert": ("apps.convert", "make a trained run sparse, dense, smaller, or several runs one"),
    "doctor": ("apps.doctor", "what is wrong with a run's routing, with the evidence and a remedy"),
    "audit": ("apps.audit", "what is wrong with a checkpoint's experts, from its files alone"),
    "export": ("apps.serve.export", "write a trained model as a graph for onnxruntime, torch.export or AOTInductor"),
    "demo": ("apps.demonstrate", "try a trained model out on a page on this machine, with its experts at work"),
    "serve": ("apps.serve.service", "a trained model behind a URL: HTTP, batches, metrics, OpenAPI"),
    "plan": ("apps.plan", "memory, traffic and time of a training on many GPUs, from its configuration alone"),
    "bench": ("apps.bench", "measure the speed of a layer on this machine"),
    "data": ("apps.cli.data", "list the datasets, or fetch one"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``moesaic ARGV``.

    Returns:
        0; 1 for an error while running, 2 for wrong usage, 130 for an interrupt, 143 for a termination. Each of these
        prints one line to stderr, and no traceback without ``--traceback``.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in args
    args = [a for a in args if a != "--traceback"]
    try:
        if line := shadowed():
            raise UsageError(line)
        return _dispatch(args)
    except (KeyboardInterrupt, SystemExit) as stop:
        advice = "; --ckpt_path last continues from the last checkpoint, if there is one"
        return stopped(stop, "" if args[:1] == ["predict"] else advice)
    except BrokenPipeError:  # such as `moesaic data list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return failed(error, show_traceback)


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    command, rest = args[0], args[1:]
    if command == "--version":
        from importlib.metadata import version

        if rest not in ([], ["--verbose"]):
            raise UsageError(f"--version takes --verbose or nothing, and got {' '.join(rest)}")
        print(f"moesaic {version('moesaic')}")
        if rest:
            from apps.base.machine import installation

            print("\n".join(f"{name}: {value}" for name, value in installation().items()))
        return 0
    if command in COMMANDS:
        from apps.base.imports import importing

        with importing():
            from apps.base.quiet import quiet
            from apps.cli.request import Request

            with quiet():  # libraries talk when a model's class is imported
                request = Request.read(command, rest, announces=True)
        if "--help_all" in rest or any(".help" in flag for flag in rest):
            from apps.cli.help import show

            if show(request):
                return 0
        from apps.cli.train import run

        return run(request)
    if command in _OTHERS:
        from apps.cli.classes import load_class
        from apps.cli.configs import own_classes

        for path in own_classes(rest):
            load_class(path)
        room = importlib.import_module(_OTHERS[command][0])
        return int(room.main(rest) if hasattr(room, "main") else _run(room.__name__, rest))
    names = [*COMMANDS, *_OTHERS]
    near = difflib.get_close_matches(command, names, n=1)
    suggestion = f"; did you mean {near[0]!r}?" if near else ""
    raise UsageError(f"{command!r} is not one of {', '.join(names)}{suggestion}")


def _run(room: str, argv: list[str]) -> int:
    """Run a command whose package has modules ``options`` and ``command``."""
    from apps.base.imports import importing

    options = importlib.import_module(f"{room}.options").OPTIONS.read(argv)  # a wrong one ends before torch is imported
    with importing():
        command = importlib.import_module(f"{room}.command")
    return int(command.run(options))


def _help() -> str:
    lines = ["usage: moesaic COMMAND [options]", "", "Mixture-of-experts models on PyTorch.", "", "commands:"]
    meanings = {name: (kind.__doc__ or "").partition("\n")[0].rstrip(".") for name, kind in COMMANDS.items()}
    meanings |= {name: text for name, (_, text) in _OTHERS.items()}
    lines += [f"  {name:<10}{text[0].lower()}{text[1:]}" for name, text in meanings.items()]
    lines += ["", "`moesaic COMMAND --help` tells more. To begin:", ""]
    lines += ["  moesaic fit --config configs/vision/digits.yaml", "  moesaic test --config configs/vision/digits.yaml"]
    return "\n".join(lines)
