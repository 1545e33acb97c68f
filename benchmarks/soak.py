"""A campaign that tries to break moesaic: kills, a full disk, load, bad input, random layers, kept losses.

    moesaic bench soak --minutes 720
    moesaic bench soak --minutes 10 --parts kills machine
    moesaic bench soak --parts kills --case 17

The minutes are shared among the parts by their weight, set-up and those of an earlier process included: stopped at
any moment, the same command goes on where it was. No case is broken off: a part that takes longer takes from those
after it, each of which tries one case at least. Parts of short cases come first. A line tells each part's first case
and each fault, and the last lines are a table of the parts. The exit code is 1 if there is a fault, or a part without
cases. Parts say in a line what they left out, such as what needs root.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apps.base.files import read_json, write_json
from apps.base.machine import machine_facts, moment
from benchmarks._soak.outcome import Outcome

PARTS = {"numbers": 3, "history": 1, "load": 4, "inputs": 3, "kills": 3, "machine": 3}
"""The parts in their order, and the weight of each."""
NEW: dict[str, Any] = {"next": 0, "cases": 0, "kinds": {}, "faults": [], "notes": [], "seconds": 0.0}
"""The state of a part that has not begun; kinds counts cases by the words before the colon."""


def tried(name: str, numbers: Iterator[int], folder: Path, state: dict[str, Any]) -> Iterator[None]:
    """Try cases of a part, count them in its state, and print their faults and notes; yields after each."""
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was stopped
    folder.mkdir(parents=True, exist_ok=True)  # a disk may still be mounted there
    cases = importlib.import_module(f"benchmarks._soak.{name}").cases(numbers, folder)
    while True:
        try:
            outcome = next(cases)
        except StopIteration:
            return
        except Exception as error:  # of the part itself: the others still have their time
            outcome = Outcome(state["next"] - 1, "the part ended", f"{type(error).__name__}: {error}")
        kind = outcome.what.partition(":")[0]
        if outcome.count and not state["cases"] and not outcome.fault:
            print(f"first case: {name} #{outcome.number}: {outcome.what}", flush=True)
        state["cases"] += outcome.count
        state["kinds"][kind] = state["kinds"].get(kind, 0) + outcome.count
        if outcome.fault:
            state["faults"].append(dataclasses.asdict(outcome))
            print(f"fault: {name} #{outcome.number}: {outcome.what}: {outcome.fault}", flush=True)
        elif not outcome.count and outcome.what not in state["notes"]:
            state["notes"].append(outcome.what)
            print(f"note: {name}: {outcome.what}", flush=True)
        yield


def campaign(names: list[str], minutes: float, output: Path) -> int:
    """Run the parts, each for its share of the minutes, and return the exit code."""
    saved = read_json(output / "state.json") or {}
    left = 60 * minutes
    for i, name in enumerate(names):
        state, share = saved.setdefault(name, copy.deepcopy(NEW)), left * PARTS[name] / sum(map(PARTS.get, names[i:]))
        began = time.monotonic() - state["seconds"]

        def numbers(state: dict[str, Any] = state, end: float = began + share) -> Iterator[int]:
            while time.monotonic() < end or not state["next"]:
                state["next"] += 1
                yield state["next"] - 1

        for _ in tried(name, numbers(), output / name, state) if state["seconds"] < share or not state["next"] else ():
            state["seconds"] = time.monotonic() - began
            write_json(output / "state.json", saved)
        left = max(left - state["seconds"], 0.0)
        shutil.rmtree(output / name, ignore_errors=True)
    command = f"moesaic bench soak --minutes {minutes:g} --parts {' '.join(names)}"
    facts = {"command": command, "date": moment(), "machine": machine_facts(), "parts": saved}
    write_json(output / "soak.json", facts)
    print(f"{'part':10} {'cases':>9} {'faults':>7} {'seconds':>8}")
    for name in names:
        state = saved[name]
        print(f"{name:10} {state['cases']:9,} {len(state['faults']):7,} {state['seconds']:8.0f}")
    return int(any(saved[name]["faults"] or not saved[name]["cases"] for name in names))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="moesaic bench soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="of all parts together (default: 60)")
    parser.add_argument("--output", type=Path, default=Path("runs/soak"), metavar="DIR", help="(default: runs/soak)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS], help="(default: all)")
    parser.add_argument("--case", type=int, metavar="NUMBER", help="of a fault's line, tried alone in DIR/alone")
    args = parser.parse_args(argv)
    output = args.output.resolve()  # cases change folders
    if args.case is None:
        return campaign(args.parts, args.minutes, output)
    state = copy.deepcopy(NEW)
    for name in args.parts:
        for _ in tried(name, iter([args.case]), output / "alone", state):
            print(f"{name} #{args.case}: {state['cases']} cases, {len(state['faults'])} faults")
    return int(bool(state["faults"]))


if __name__ == "__main__":
    raise SystemExit(main())
