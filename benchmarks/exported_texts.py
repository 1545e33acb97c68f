"""Time of a sentence by itself, greedily: by a checkpoint in eager mode, and by its export in onnxruntime.

    moesaic bench exported_texts RUN --texts FILE [--pair en-de] [--forms standard contrib] [--method beam]
    moesaic bench exported_texts RUN --texts FILE --quantize int4

Both go the way of ``predict``, from a line of text to a line of text, with one search. RUN is a translator or a
language model. FILE has a text a line, or is a test's ``report/sentences.jsonl``, of which the sources are taken. Each
round times each system once, over all texts in turn, and ratios are taken within a round. The processor's time stands
beside the clock's, for a busy machine stretches the latter. One thread, unless ``--threads`` says otherwise.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from apps import registry
from apps.base.machine import machine_line
from apps.base.sealed import seal
from apps.serve.export.onnx import to_onnx
from apps.train.checkpoint.loading import load
from apps.train.cost.quantizing import quantize_model
from apps.train.publish.exported import OnnxGraph
from benchmarks._rounds import write_rows


@dataclass(frozen=True)
class Row:
    """The times of one system.

    Attributes:
        system: "eager", or a form of ONNX.
        milliseconds, processor: medians over rounds of a text's time, by the clock and by the processor.
        of_eager: median of the ratio to eager mode's processor time, within a round.
        same: share of the texts that are eager mode's.
    """

    system: str
    milliseconds: float
    processor: float
    of_eager: float
    same: float


def texts_of(path: Path, count: int, pair: str | None) -> list[str]:
    """Return so many texts of a file, at equal steps."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in lines]
        lines = [row["source"] for row in rows if pair in (None, row.get("pair"))]
    lines = [line for line in lines if line.strip()]
    count = min(count, len(lines))
    return [lines[i * len(lines) // count] for i in range(count)]


def exported(model: Any, form: Any, folder: Path) -> Any:
    """Return a copy of a model whose graphs run in onnxruntime."""
    task, graphs = registry.exported_task(type(model)), {}
    for graph in task(model).exported().graphs:
        path = folder / f"{graph.name}.onnx"
        with torch.no_grad():
            to_onnx(graph, path, form)
        seal(path)
        graphs[graph.name] = OnnxGraph(path)
    other = copy.deepcopy(model)
    task.attach(other, graphs)
    return other


def measured(models: dict[str, Any], texts: Sequence[str], rounds: int, options: dict[str, Any]) -> list[Row]:
    """Return the rows of all systems; the first is eager mode."""
    written = {name: [model.predict([text], **options)[0] for text in texts] for name, model in models.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            clock, processor = time.perf_counter(), time.process_time()
            for text in texts:
                model.predict([text], **options)
            spent = time.perf_counter() - clock, time.process_time() - processor
            times[name].append((1e3 * spent[0] / len(texts), 1e3 * spent[1] / len(texts)))
    eager = next(iter(models))
    rows = []
    for name, spent in times.items():
        clock, processor = (statistics.median(column) for column in zip(*spent, strict=True))
        ratio = statistics.median(own[1] / of[1] for own, of in zip(spent, times[eager], strict=True))
        same = sum(map(str.__eq__, written[name], written[eager])) / len(texts)
        rows.append(Row(name, clock, processor, ratio, same))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder, or a checkpoint")
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--pair", help="of a translator of several")
    parser.add_argument("--forms", nargs="+", default=["standard"], choices=["standard", "contrib"])
    parser.add_argument("--quantize", metavar="int8|int4[:GROUP]", help="experts in whole numbers, in eager mode too")
    parser.add_argument("--method", default="greedy", choices=["greedy", "beam"])
    parser.add_argument("--count", type=int, default=30, help="texts")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write all rows to this file too")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(f"{machine_line()}, onnxruntime {version('onnxruntime')}, {args.method}, {args.threads} threads")
    model = load(args.run).eval()
    if args.quantize is not None:
        quantize_model(model, args.quantize)
    options: dict[str, Any] = {"method": args.method, **({"pair": args.pair} if args.pair else {})}
    texts = texts_of(args.texts, args.count, args.pair)
    models = {"eager": model}
    with tempfile.TemporaryDirectory() as folder:
        for form in args.forms:
            (own := Path(folder) / form).mkdir()
            models[form] = exported(model, form, own)
        rows = measured(models, texts, args.rounds, options)
    for row in rows:
        print(
            f"{row.system:10} {row.milliseconds:8.1f} ms a text, processor {row.processor:8.1f} ms, "
            f"{row.of_eager:.2f} of eager, {row.same:.0%} of {len(texts)} texts the same"
        )
    machine = {"onnxruntime": version("onnxruntime"), "threads": args.threads}
    write_rows(args.json, rows, machine, method=args.method, texts=len(texts), quantize=args.quantize)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
