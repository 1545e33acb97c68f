"""All figures of docs/results/serving.md, one benchmark after the other.

    moesaic bench serving --translator runs/bible --runs runs/digits runs/adult
    moesaic bench serving --translator runs/bible --runs runs/digits --only quantized offloaded --output /tmp/figures

Each benchmark is a process of its own and leaves a JSON file. One that fails does not stop those after it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

BENCHMARKS = ("quantized", "offloaded", "exported", "exported_texts", "service")


def commands(translator: Path, pair: str | None, runs: Sequence[Path], output: Path) -> dict[str, list[str]]:
    """Return the options of each benchmark, by its name.

    Args:
        translator: run of a translation model, tested.
        pair: the one to translate, where it has several.
        runs: runs of classifiers and recommenders.
        output: folder of the JSON files.
    """
    sentences = translator / "report" / "sentences.jsonl"
    of_pair = [] if pair is None else ["--pair", pair]
    options = {
        "quantized": ["--ckpt_path", str(translator)],
        "offloaded": ["--run", str(translator)],
        "exported": [*map(str, runs), "--layers"],
        "exported_texts": [str(translator), "--texts", str(sentences), *of_pair, "--forms", "standard", "contrib"],
        "service": [*map(str, runs)],
    }
    return {name: [*own, "--json", str(output / f"{name}.json")] for name, own in options.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--translator", type=Path, required=True, help="run of a translation model, tested")
    parser.add_argument("--pair", help="such as en-de, of a translator of several, for its export")
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="runs of classifiers and recommenders")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS, help="benchmarks to run")
    parser.add_argument("--output", type=Path, default=Path("docs/runs/serving"), help="folder of the JSON files")
    args = parser.parse_args(argv)
    if not (args.translator / "report" / "sentences.jsonl").is_file():
        parser.error(f"{args.translator} has no report/sentences.jsonl: moesaic test --ckpt_path {args.translator}")
    args.output.mkdir(parents=True, exist_ok=True)
    failed = []
    for name, options in commands(args.translator, args.pair, args.runs, args.output).items():
        if name in args.only:
            print(f"== {name} {' '.join(options)}", flush=True)
            if subprocess.run([sys.executable, "-m", "apps.cli", "bench", name, *options]).returncode:
                failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
