"""What quantized experts cost a trained translation model: BLEU, bytes, and the time of greedy decoding.

BLEU is that of ``moesaic test --quantize FORM`` on all test sentences, in float32 otherwise. Times are those of 32
sentences of the test, one at a time and all at once, and of an MoE layer of D=512, F=2048, whose experts are too large
for a processor's cache. They are seconds of the process on one thread, which programs beside it disturb little. Every
round times each form once, in turn, and ratios to float32 are taken within a round.

    python -m benchmarks.quantized --ckpt_path runs/bible
    python -m benchmarks.quantized --ckpt_path runs/bible --forms int8 int4:32 --tests /tmp/tests --json rows.json
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import apps
import core
from apps.base.machine import machine_line
from apps.base.quiet import quiet
from apps.cli.request import Request
from apps.cli.train import SparseCLI, build
from apps.nlp.text.batches import TranslationBatch
from apps.train.cost.quantizing import quantize_model, read_form
from benchmarks._rounds import in_turn

FLOAT = "float32"
SENTENCES = 32
LAYER = core.MoEConfig(64, core.TokenChoice(2), core.FFN(2048))
LAYER_DIM, CALLS = 512, 20


def tested(run: str, form: str, folder: Path, options: Sequence[str]) -> dict[str, Any]:
    """Return the record of a test with experts in this form; one that ``folder`` has already is read."""
    own = folder / form.replace(":", "-")
    if not (own / "test.json").exists():
        words = ["--ckpt_path", run, "--run_dir", str(own), "--trainer.precision", "32-true", *options]
        words += [] if form == FLOAT else ["--quantize", form]
        with quiet():
            SparseCLI(Request.read("test", words)).execute()
    record: dict[str, Any] = json.loads((own / "test.json").read_text())
    return record


def sentences(run: str) -> TranslationBatch:
    """Return the first ``SENTENCES`` of a batch of the test."""
    with quiet():
        data = build("test", ["--ckpt_path", run]).datamodule
        data.prepare_data()
        data.setup("test")
        batch = next(batch for batch in data.test_dataloader() if len(batch.index_B) >= SENTENCES)
    return TranslationBatch(*(rows[:SENTENCES] for rows in batch))


def decoding(model: Any, batches: Sequence[TranslationBatch]) -> Callable[[], float]:
    """Return a function that translates the batches greedily, and returns the seconds of it."""
    config = dataclasses.replace(model.decode, method="greedy", num_return_sequences=1)

    def run() -> float:
        start = time.process_time()
        with torch.inference_mode():
            for batch in batches:
                model.translate(batch, config)
        return time.process_time() - start

    return run


def layer_calls(layer: nn.Module, num_tokens: int) -> Callable[[], float]:
    """Return a function that calls a layer ``CALLS`` times with other tokens, and returns the seconds of a call."""
    x_C1SD = torch.randn(CALLS, 1, num_tokens, LAYER_DIM, generator=torch.Generator().manual_seed(0))

    def run() -> float:
        start = time.process_time()
        with torch.inference_mode():
            for x_1SD in x_C1SD:
                layer(x_1SD)
        return (time.process_time() - start) / CALLS

    return run


def quartiles(values: Sequence[float]) -> list[float]:
    """Return the lower quartile, the median and the upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else list(values) * 3


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="quantized", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--ckpt_path", required=True, help="the run of a translation model")
    parser.add_argument("--forms", nargs="+", default=["int8", "int4", "int4:64"], help="as --quantize takes them")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds, after one warm-up")
    parser.add_argument("--tests", type=Path, help="folder of the tests' records, where those that are there are read")
    parser.add_argument("--json", type=Path, help="write all rows to this file too")
    args, options = parser.parse_known_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds} must be at least 1")
    try:
        for form in args.forms:
            read_form(form)
    except ValueError as error:
        parser.error(str(error))
    forms = [FLOAT, *args.forms]
    torch.set_num_threads(1)
    model = apps.load(args.ckpt_path)
    models = {form: model if form == FLOAT else quantize_model(copy.deepcopy(model), form) for form in forms}
    batch = sentences(args.ckpt_path)
    each = [TranslationBatch(*(rows[i : i + 1] for rows in batch)) for i in range(SENTENCES)]
    seconds = {
        size: in_turn({form: decoding(m, batches) for form, m in models.items()}, args.rounds)
        for size, batches in (("1", each), (str(SENTENCES), [batch]))
    }
    torch.manual_seed(0)
    layer = LAYER.build(LAYER_DIM).eval()
    layers = {form: layer if form == FLOAT else quantize_model(copy.deepcopy(layer), form) for form in forms}
    of_layer = {
        tokens: in_turn({form: layer_calls(own, tokens) for form, own in layers.items()}, args.rounds)
        for tokens in (1, SENTENCES)
    }
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) if args.tests is None else args.tests
        records = {form: tested(args.ckpt_path, form, folder, options) for form in forms}
    rows = []
    before = core.expert_bytes(model)
    for form in forms:
        num_bytes = core.expert_bytes(models[form])
        row = {"experts": form, "bleu": records[form]["test/bleu"], "chrf": records[form]["test/chrf"]}
        row |= {"bytes": num_bytes, "times_fewer": before / num_bytes}
        for size, of_forms in seconds.items():
            pairs = zip(of_forms[form], of_forms[FLOAT], strict=True)
            row |= {
                f"ms_a_sentence_at_batch_{size}": [1e3 / SENTENCES * s for s in quartiles(of_forms[form])],
                f"time_over_float32_at_batch_{size}": quartiles([own / plain for own, plain in pairs]),
            }
        for tokens, of_forms in of_layer.items():
            pairs = zip(of_forms[form], of_forms[FLOAT], strict=True)
            row |= {
                f"layer_ms_of_{tokens}_tokens": [1e3 * s for s in quartiles(of_forms[form])],
                f"layer_time_over_float32_of_{tokens}_tokens": quartiles([own / plain for own, plain in pairs]),
            }
        rows.append(row)
    print(f"{machine_line()}\n")
    print(
        "| experts | BLEU | chrF++ | bytes | of float32 | ms a sentence, batch 1 | of float32 | batch 32 | of float32 |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [row["experts"], f"{row['bleu']:.2f}", f"{row['chrf']:.2f}", f"{row['bytes']:,}"]
        cells.append(f"1/{row['times_fewer']:.2f}")
        for size in seconds:
            low, median, high = row[f"ms_a_sentence_at_batch_{size}"]
            over = row[f"time_over_float32_at_batch_{size}"][1]
            cells += [f"{median:.1f} ({low:.1f}-{high:.1f})", f"{over:.2f}x"]
        print(f"| {' | '.join(cells)} |")
    print(f"\nA layer of {LAYER.num_experts} experts, D={LAYER_DIM}, F=2048, 2 of them a token:\n")
    print("| experts | ms of a token | of float32 | ms of 32 tokens | of float32 |\n|---|---|---|---|---|")
    for row in rows:
        cells = [row["experts"]]
        for tokens in of_layer:
            low, median, high = row[f"layer_ms_of_{tokens}_tokens"]
            over = row[f"layer_time_over_float32_of_{tokens}_tokens"][1]
            cells += [f"{median:.2f} ({low:.2f}-{high:.2f})", f"{over:.2f}x"]
        print(f"| {' | '.join(cells)} |")
    if args.json:
        command = " ".join(["python -m benchmarks.quantized", *(sys.argv[1:] if argv is None else argv)])
        table = {"machine": machine_line(), "command": command, "rounds": args.rounds, "rows": rows}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(table, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
