"""A translation model with its experts offloaded: hit rates, stalls and times beside the resident model, at batch 1.

Greedy translation of the test sentences of a run, which ``moesaic test`` has left in its report. Each sentence is
translated by the resident model and by each setting in turn, so that ratios of times are of the same moment. The first
sentences fill the slots and are not counted. An expert counts as hit where it was in a slot when a layer needed it,
once a layer and step; of the encoder, which needs nearly all experts of a layer at once, and of the decoder. Experts
that were on their way are misses, of which there are more where the fetching thread waits for a processor.

    moesaic bench offloaded --run runs/bible
    moesaic bench offloaded --run runs/bible --sentences 200 --json docs/runs/serving/offloaded.json
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

import apps
import core
from apps.base.machine import machine_line
from core.offload import offloadable_bytes

SHARES = (0.25, 0.5, 0.75)
POLICIES: tuple[Literal["lfru", "lru"], ...] = ("lru", "lfru")
WARM_UP = 10
"""Sentences that fill the slots and the counts."""
COLUMNS = (
    "slots",
    "experts in",
    "policy",
    "prefetch",
    "same output",
    "hit rate",
    "there or on their way",
    "decoder's",
    "stall, ms a sentence",
    "MB moved",
    "a sentence over resident",
    "decoder over resident (quartiles)",
)


@dataclass
class Setting:
    """One way to offload, its model, and the times of its sentences.

    Attributes:
        share: share of the experts' bytes that the slots take.
        policy, prefetch: as ``core.offload_experts`` takes them.
        in_file: whether the experts are in a file; else in memory.
        model: the model, ``offloaded`` its handle.
        seconds, step_seconds: time of each sentence, and of the decoder's steps in it.
    """

    share: float
    policy: Literal["lfru", "lru"]
    prefetch: bool
    in_file: bool
    model: Any = None
    offloaded: Any = None
    seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)


class Stopwatch:
    """Adds up the time of a network's ``step``."""

    def __init__(self, network: Any) -> None:
        self.seconds, self._step = 0.0, network.step
        network.step = self.step

    def step(self, *args: Any) -> Any:
        begin = time.perf_counter()
        try:
            return self._step(*args)
        finally:
            self.seconds += time.perf_counter() - begin


def sentences(run: Path, count: int, seed: int) -> list[tuple[str, str]]:
    """Return pairs and sources of test sentences in a random order, those of all pairs mixed."""
    file = run / "report" / "sentences.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    random.Random(seed).shuffle(rows)
    return [(row["pair"], row["source"]) for row in rows[:count]]


def translate(model: Any, watch: Stopwatch, pair: str, source: str) -> tuple[str, float, float]:
    """Return a translation, its seconds, and those of the decoder's steps."""
    steps, begin = watch.seconds, time.perf_counter()
    (text,) = model.predict([source], pair=pair, method="greedy")
    return text, time.perf_counter() - begin, watch.seconds - steps


def of_decoder(offloaded: Any) -> Any:
    parts = [s for name, s in offloaded.by_module().items() if ".decoder." in name]
    return sum(parts, core.OffloadStatistics())


def row_of(setting: Setting, resident: list[float], resident_steps: list[float], same: bool) -> dict[str, Any]:
    every, decoder = setting.offloaded.statistics, of_decoder(setting.offloaded)
    count = len(setting.seconds)
    ratios = [b / a for a, b in zip(resident_steps, setting.step_seconds, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "share": setting.share,
        "slots": setting.offloaded.num_slots,
        "experts": setting.offloaded.num_experts,
        "policy": setting.policy,
        "prefetch": setting.prefetch,
        "in_file": setting.in_file,
        "same_output": same,
        "hit_rate": every.hit_rate,
        "foreseen_rate": every.foreseen_rate,
        "decoder_hit_rate": decoder.hit_rate,
        "stall_ms_per_sentence": 1000 * every.stall_seconds / count,
        "mb_moved_per_sentence": every.bytes_moved / count / 2**20,
        "prefetched": every.prefetched,
        "unused": every.unused,
        "late": every.late,
        "ms_per_sentence": 1000 * statistics.median(setting.seconds),
        "times_resident": sum(setting.seconds) / sum(resident),
        "decoder_times_resident": sum(setting.step_seconds) / sum(resident_steps),
        "decoder_ratio_quartiles": [low, middle, high],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="offloaded", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a trained and tested translation model")
    parser.add_argument("--sentences", type=int, default=100, help="sentences, after those that warm up")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="shares of the experts in slots")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads that compute")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of sentences")
    parser.add_argument("--json", type=Path, help="write all rows to this file too")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    model = apps.load(args.run)
    lines = sentences(args.run, WARM_UP + args.sentences, args.seed)
    total = offloadable_bytes(model)
    ways = [(policy, prefetch) for policy in POLICIES for prefetch in (False, True)]
    settings = [Setting(share, *way, in_file=False) for share, way in itertools.product(args.shares, ways)]
    settings += [Setting(share, *way, in_file=True) for share in args.shares if share == 0.5 for way in ways[-2:]]
    print(f"{machine_line()}; {args.threads} thread(s); {args.sentences} sentences; experts {total:,} bytes\n")
    with tempfile.TemporaryDirectory() as folder:
        for i, setting in enumerate(settings):
            setting.model = copy.deepcopy(model)
            path = Path(folder) / f"{i}.safetensors" if setting.in_file else None
            budget = int(setting.share * total)
            setting.offloaded = core.offload_experts(setting.model, budget, path, setting.policy, setting.prefetch)
        rows = measured(model, settings, lines)
    if args.json:
        about = {"machine": machine_line(), "threads": args.threads, "seed": args.seed, "sentences": args.sentences}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**about, "expert_bytes": total, "rows": rows}, indent=1) + "\n")
    return 0


def measured(model: Any, settings: list[Setting], lines: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Translate all sentences in all settings, and print and return what came of it."""
    watches = [Stopwatch(m.model) for m in (model, *(setting.model for setting in settings))]
    resident: list[float] = []
    resident_steps: list[float] = []
    same = [True] * len(settings)
    for number, (pair, source) in enumerate(lines):
        if number == WARM_UP:
            for setting in settings:
                setting.offloaded.reset_statistics()
        wanted, seconds, steps = translate(model, watches[0], pair, source)
        if number >= WARM_UP:
            resident.append(seconds)
            resident_steps.append(steps)
        for i, setting in enumerate(settings):
            text, seconds, steps = translate(setting.model, watches[i + 1], pair, source)
            same[i] &= text == wanted
            if number >= WARM_UP:
                setting.seconds.append(seconds)
                setting.step_seconds.append(steps)
    print(f"resident: {1000 * statistics.median(resident):.0f} ms a sentence\n")
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    rows = []
    for i, setting in enumerate(settings):
        row = row_of(setting, resident, resident_steps, same[i])
        rows.append({**row, "resident_ms_per_sentence": 1000 * statistics.median(resident)})
        low, _, high = row["decoder_ratio_quartiles"]
        cells = (
            f"{row['slots']} of {row['experts']}",
            "a file" if row["in_file"] else "memory",
            row["policy"],
            "yes" if row["prefetch"] else "no",
            "yes" if row["same_output"] else "no",
            f"{row['hit_rate']:.3f}",
            f"{row['foreseen_rate']:.3f}",
            f"{row['decoder_hit_rate']:.3f}",
            f"{row['stall_ms_per_sentence']:.1f}",
            f"{row['mb_moved_per_sentence']:.1f}",
            f"{row['times_resident']:.2f}x",
            f"{row['decoder_times_resident']:.2f}x ({low:.2f}-{high:.2f})",
        )
        print(f"| {' | '.join(cells)} |", flush=True)
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
