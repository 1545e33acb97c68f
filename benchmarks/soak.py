"""A campaign that tries to break moesaic: kills, a full disk, load, bad input, random layers, kept losses.

    moesaic bench soak --minutes 720
    moesaic bench soak --minutes 10 --parts kills,machine
    moesaic bench soak --part kills --case 17

The minutes are shared among the parts by their weight, those of an earlier process included: stopped at any moment, the
same command goes on where it was. Each fault is one line, and the last lines are a table of the parts. The exit code is
1 if there is a fault, or a part without cases. Parts say in a line what they left out, such as what needs root.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apps.base.files import read_json, write_json
from apps.base.machine import machine_facts, moment
from benchmarks._soak.outcome import Outcome

PARTS = ("kills", "machine", "load", "inputs", "numbers", "history")


class Part:
    """A part of the campaign and how far it has come.

    Attributes:
        state: next case, cases and those of each kind, faults with their number, notes, seconds; plain values.
    """

    def __init__(self, name: str, state: dict[str, Any] | None = None) -> None:
        self.name, self.module = name, importlib.import_module(f"benchmarks._soak.{name}")
        self.state = state or {"next": 0, "cases": 0, "kinds": {}, "faults": [], "notes": [], "seconds": 0.0}

    def run(self, seconds: float, folder: Path) -> Iterator[None]:
        """Try cases for so long, those before included, and yield after each of them."""
        began, before, now = time.monotonic(), self.state["seconds"], self.state["next"]

        def numbers() -> Iterator[int]:
            nonlocal now
            while time.monotonic() - began + before < seconds:
                now = self.state["next"]
                self.state["next"] += 1
                yield now

        try:
            for outcome in self.module.cases(numbers(), folder):
                self.state["seconds"] = before + time.monotonic() - began
                self.note(outcome)
                yield
        except Exception as error:  # of the part itself: the others still have their time
            self.note(Outcome(now, "the part ended", f"{type(error).__name__}: {error}"))
        self.state["seconds"] = before + time.monotonic() - began
        yield

    def note(self, outcome: Outcome) -> None:
        """Count a case, and print its fault or note."""
        kinds, kind = self.state["kinds"], outcome.what.partition(":")[0]
        if outcome.count or outcome.fault:
            self.state["cases"] += outcome.count
            kinds[kind] = kinds.get(kind, 0) + outcome.count
        if outcome.fault:
            found = {"number": outcome.number, "what": outcome.what, "fault": outcome.fault}
            self.state["faults"].append(found)
            print(f"fault: {self.name} #{outcome.number}: {outcome.what}: {outcome.fault}", flush=True)
        elif not outcome.count and outcome.what not in self.state["notes"]:
            self.state["notes"].append(outcome.what)
            print(f"note: {self.name}: {outcome.what}", flush=True)


def campaign(names: list[str], minutes: float, output: Path) -> int:
    """Run the parts, each for its share of the minutes, and return the exit code."""
    saved = read_json(output / "state.json") or {}
    parts = [Part(name, saved.get(name)) for name in names]
    weights = sum(part.module.WEIGHT for part in parts)
    for part in parts:
        share = 60 * minutes * part.module.WEIGHT / weights
        written, folder = 0.0, output / part.name
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was stopped
        folder.mkdir(parents=True)
        for _ in part.run(share, folder) if part.state["seconds"] < share else ():
            saved[part.name] = part.state
            if time.monotonic() - written > 1:
                write_json(output / "state.json", saved)
                written = time.monotonic()
        write_json(output / "state.json", saved)
        shutil.rmtree(folder, ignore_errors=True)
    facts = {"command": f"moesaic bench soak --minutes {minutes:g} --parts {','.join(names)}", "date": moment()}
    write_json(output / "soak.json", {**facts, "machine": machine_facts(), "parts": saved})
    print(f"{'part':10} {'cases':>9} {'faults':>7} {'seconds':>8}")
    for part in parts:
        state = part.state
        print(f"{part.name:10} {state['cases']:9,} {len(state['faults']):7,} {state['seconds']:8.0f}")
    return int(any(part.state["faults"] or not part.state["cases"] for part in parts))


def alone(name: str, case: int, output: Path) -> int:
    """Try one case, keep its folder, and return 1 if it has a fault."""
    folder = output / f"{name}-{case}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    part = Part(name)
    for outcome in part.module.cases(iter([case]), folder):
        part.note(outcome)
        print(f"{outcome.what}: {outcome.fault or 'as it should'}")
    print(f"its files are in {folder}")
    return int(bool(part.state["faults"]))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="moesaic bench soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="of all parts together (default: 60)")
    parser.add_argument("--output", type=Path, default=Path("runs/soak"), metavar="DIR", help="(default: runs/soak)")
    parser.add_argument("--parts", default=",".join(PARTS), help="a comma between them (default: all)")
    parser.add_argument("--part", choices=PARTS, help="of the one --case to try")
    parser.add_argument("--case", type=int, metavar="NUMBER", help="of a fault's line")
    args = parser.parse_args(argv)
    names = args.parts.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--parts: {unknown[0]!r} is none of {', '.join(PARTS)}")
    if (args.part is None) != (args.case is None):
        parser.error("--part and --case go together")
    output = args.output.resolve()  # cases change folders
    return campaign(names, args.minutes, output) if args.part is None else alone(args.part, args.case, output)


if __name__ == "__main__":
    raise SystemExit(main())
