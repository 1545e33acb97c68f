"""Print the time of exported models beside that of eager mode, at batch 1 and 32.

    python -m benchmarks.exported RUN [RUN ...] [--formats standard contrib torch_export aoti] [--json FILE]
    python -m benchmarks.exported --layers          # both forms of ONNX for single layers
    python -m benchmarks.exported RUN --quantize int4 --formats standard contrib

A RUN is a checkpoint or the folder of a run: each of its graphs has a table. Inputs are normal numbers for float
tensors, and the rows of the graph's example for others. Each round runs each system once for some milliseconds, in
turn, and ratios are taken within a round. The processor's time for a call stands beside the clock's, for a busy
machine stretches the latter. One thread, unless ``--threads`` says otherwise.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor

import core
from apps import registry
from apps.base.machine import machine_line
from apps.serve.export.command import difference
from apps.serve.export.onnx import to_onnx
from apps.serve.export.programs import to_aoti, to_torch_export
from apps.train.checkpoint.loading import load
from apps.train.cost.quantizing import quantize_model
from apps.train.publish.exporting import Graph
from benchmarks._rounds import write_rows

BATCHES = (1, 32)
FORMATS = ("standard", "contrib", "torch_export")
Call = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """The times of one system.

    Attributes:
        graph: name of the run and of its graph.
        batch: B.
        system: "eager", "standard", "contrib", "torch_export" or "aoti".
        computes: "chosen" experts or "all".
        milliseconds, processor: medians over rounds of a call's time, by the clock and by the processor.
        of_eager: median of the ratio to eager mode's processor time, within a round.
        error: largest difference from eager mode, over the largest finite output; inf where infinities differ.
    """

    graph: str
    batch: int
    system: str
    computes: str
    milliseconds: float
    processor: float
    of_eager: float
    error: float


def inputs_of(graph: Graph, batch: int) -> dict[str, Tensor]:
    """Return inputs for so many examples; other axes are as long as in the example."""
    generator, made = torch.Generator().manual_seed(0), {}
    for name, value in graph.inputs.items():
        if graph.dynamic.get(name, {}).get(0) == "batch":
            value = value[torch.arange(batch) % len(value)]
        made[name] = torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
    return made


def systems(graph: Graph, formats: tuple[str, ...], threads: int, folder: Path) -> dict[str, Callable[..., Any]]:
    """Return what computes a graph, by name; a format that does not fit is left out with a line that says why."""
    made: dict[str, Callable[..., Any]] = {"eager": lambda inputs: graph.network(*inputs.values())}
    for name in formats:
        path = folder / f"{name}.{'onnx' if name in ('standard', 'contrib') else 'pt2'}"
        begin = time.perf_counter()
        try:
            made[name] = _written(graph, name, path, threads)
        except ValueError as error:
            print(f"  no {name}: {error}")
            continue
        print(f"  {name}: {path.stat().st_size / 1e6:.2f} MB, written in {time.perf_counter() - begin:.0f} s")
    return made


def _written(graph: Graph, name: str, path: Path, threads: int) -> Callable[..., Any]:
    if name == "torch_export":
        program = torch.export.load(to_torch_export(graph, path)).module()
        return lambda inputs: program(*inputs.values())
    if name == "aoti":
        package = torch._inductor.aoti_load_package(str(to_aoti(graph, path)))
        return lambda inputs: package(*inputs.values())
    to_onnx(graph, path, name)  # type: ignore[arg-type]
    session = session_of(path, threads)
    taken = [value.name for value in session.get_inputs()]
    return lambda inputs: [torch.from_numpy(y) for y in session.run(None, {n: inputs[n].numpy() for n in taken})]


def session_of(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """Return a file of ONNX, loaded."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    return onnxruntime.InferenceSession(str(path), options)


def measured(calls: Mapping[str, Call], rounds: int, seconds: float) -> dict[str, list[tuple[float, float]]]:
    """Return the clock's and the processor's seconds of a call in each round, by system."""
    counts, times = {}, {name: [] for name in calls}
    for name, call in calls.items():
        call()
        begin = time.process_time()
        call()
        counts[name] = max(1, round(seconds / max(time.process_time() - begin, 1e-5)))
    for _ in range(rounds):
        for name, call in calls.items():
            clock, processor = time.perf_counter(), time.process_time()
            for _ in range(counts[name]):
                call()
            spent = time.perf_counter() - clock, time.process_time() - processor
            times[name].append((spent[0] / counts[name], spent[1] / counts[name]))
    return times


def rows(label: str, graph: Graph, made: Mapping[str, Callable[..., Any]], args: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows of one graph."""
    from apps.serve.export.programs import computes_all

    computes = "all" if computes_all(graph.network) else "chosen"
    for batch in BATCHES:
        inputs = inputs_of(graph, batch)
        expected = first(made["eager"](inputs))
        times = measured({n: partial(f, inputs) for n, f in made.items()}, args.rounds, args.seconds)
        for name, spent in times.items():
            ratios = [own[1] / eager[1] for own, eager in zip(spent, times["eager"], strict=True)]
            error = difference(first(made[name](inputs)), expected)
            clock, processor = (1e3 * statistics.median(column) for column in zip(*spent, strict=True))
            yield Row(label, batch, name, computes, clock, processor, statistics.median(ratios), error)


def first(outputs: Any) -> Tensor:
    """Return the first output of a call."""
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def layers(quantize: str | None) -> Iterator[tuple[str, Graph]]:
    """Yield MoE layers with experts that onnxruntime's operator knows: 49 tokens an example, 8 experts, 2 a token."""
    kinds = {
        "relu": core.FFN(hidden_dim=256, activation="relu"),
        "gelu_tanh": core.FFN(hidden_dim=256, activation="gelu_tanh"),
        "swiglu": core.SwiGLU(hidden_dim=256),
    }
    for name, expert in kinds.items():
        torch.manual_seed(0)
        layer = core.MoEConfig(num_experts=8, router=core.TokenChoice(top_k=2), expert=expert).build(128).eval()
        if quantize is not None:
            quantize_model(layer, quantize)
        yield name, Graph("layer", layer, {"x": torch.randn(2, 49, 128)}, ("y",), {"x": {0: "batch"}})


def graphs(runs: list[str], quantize: str | None) -> Iterator[tuple[str, Graph]]:
    """Yield the graphs of trained models."""
    for run in runs:
        model = load(Path(run)).eval()
        if quantize is not None:
            quantize_model(model, quantize)
        for graph in registry.exported_task(type(model))(model).exported().graphs:
            yield f"{type(model).__name__} {graph.name}", graph


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="checkpoints, or folders of runs")
    parser.add_argument("--layers", action="store_true", help="measure single layers too")
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=[*FORMATS, "aoti"])
    parser.add_argument("--quantize", metavar="int8|int4[:GROUP]", help="experts in whole numbers, in eager mode too")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.02, help="of the processor, for a system in a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write all rows to this file too")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(f"{machine_line()}, onnxruntime {onnxruntime.__version__}")
    every: list[Row] = []
    for label, graph in (*graphs(args.runs, args.quantize), *(layers(args.quantize) if args.layers else ())):
        print(label)
        with tempfile.TemporaryDirectory() as folder:
            made = systems(graph, tuple(args.formats), args.threads, Path(folder))
            with torch.inference_mode():
                for row in rows(label, graph, made, args):
                    every.append(row)
                    print(
                        f"  batch {row.batch:3}  {row.system:12} {row.milliseconds:9.3f} ms  processor "
                        f"{row.processor:8.3f} ms  {row.of_eager:5.2f} of eager  error {row.error:.0e}  {row.computes}"
                    )
    machine = {"onnxruntime": version("onnxruntime"), "threads": args.threads}
    write_rows(args.json, every, machine, quantize=args.quantize)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
