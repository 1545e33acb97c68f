"""Print the time of ``moesaic predict`` from a file of Census-Income's rows to a Parquet file of their scores.

    python -m benchmarks.predict --run RUN [--rows 1000000] [--kinds parquet csv]

RUN is a training of configs/recsys/census_income.yaml. The test rows are written as often as they are needed, in an
order of chance. A first run over a few rows loads what a process loads once. Both times are given: a busy machine
stretches the clock's, and the processor's says what each core could do.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from apps.base.machine import machine_line
from apps.cli import main as moesaic
from apps.data.datasets import prepare
from apps.recsys.datasets import RECSYS_DATASETS


def write(path: Path, num_rows: int) -> None:
    """Write rows of the test, without their labels; the ending says the format."""
    raw = RECSYS_DATASETS["census_income"].read(prepare("census_income"))
    assert raw.test is not None
    table, draw = raw.test.select(list(raw.config.features)), np.random.default_rng(0)
    make = pa.parquet.ParquetWriter if path.suffix == ".parquet" else pa.csv.CSVWriter
    with make(path, table.schema) as file:
        for start in range(0, num_rows, len(table)):
            order = draw.permutation(len(table))[: num_rows - start]
            file.write_table(table.take(pa.array(order)))


def predict(run: str, path: Path, output: Path) -> tuple[float, float]:
    """Score a file, and return the seconds of the clock and of the processor."""
    flags = ["--config", "configs/recsys/census_income.yaml", "--ckpt_path", run, "--run_dir", str(output.parent)]
    flags += ["--data.predict_file", str(path), "--output", str(output), "--trainer.enable_progress_bar", "false"]
    clock, processor = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        status = moesaic(["predict", *flags])
    if status != 0:
        raise SystemExit(status)
    return time.perf_counter() - clock, time.process_time() - processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--kinds", nargs="+", default=["parquet", "csv"], choices=["parquet", "csv"])
    args = parser.parse_args()
    print(machine_line())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in args.kinds:
            for rows in (1000, args.rows):
                path = folder / f"rows{rows}.{kind}"
                write(path, rows)
                clock, processor = predict(args.run, path, folder / f"scores{rows}{kind}.parquet")
                path.unlink()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            speed, cost = args.rows / clock, processor / args.rows * 1e6
            print(f"{kind}, {args.rows:,} rows: {speed:,.0f} a second, {cost:.1f} us of a processor a row", flush=True)
            print(f"memory so far: {peak:,.0f} MiB at most", flush=True)


if __name__ == "__main__":
    main()
