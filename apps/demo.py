"""``make demo``: sparse and dense models of equal cost on real images, a real table and real text, on 2 cores.

It runs ``moesaic compare`` on the handwritten digits that come with scikit-learn, and on Fashion-MNIST, Census-Income
and the strings of a program where they can be had, with few steps and seeds, and ends with one report over all of them.
What is finished is not done again.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from apps.base.files import CONFIGS
from apps.cli import failed, stopped
from apps.cli.flags import take

if TYPE_CHECKING:
    from apps.report.page import Page

ENOUGH_SECONDS = 300.0
"""A part is not begun this long after the start: a machine that is so slow gets the first ones."""


@dataclass(frozen=True)
class Part:
    """One comparison of the demo.

    Attributes:
        name: name of its folder.
        config: path below ``configs/``.
        dataset: name of the dataset, without which the part is left out.
        says: text that announces the part.
        title: title of its table and pictures.
        arguments: options after ``moesaic compare CONFIG``; ``--output`` and ``--jobs`` are added.
    """

    name: str
    config: str
    dataset: str
    says: str
    title: str
    arguments: str


PARTS = (
    Part(
        name="digits",
        config="vision/digits.yaml",
        dataset="digits",
        says="1,797 handwritten digits of 8x8 pixels. A vision transformer with 8 experts, 2 a patch, in two of its\n"
        "4 blocks; a dense one of equal FLOPs; a dense one of equal parameters. Each tries 3 learning rates in\n"
        "short runs, and is then trained with 3 seeds.",
        title="Sparse and dense on digits",
        arguments="--trainer.max_epochs 10 --data.random_resized_crop null --seeds 3 --search_share 0.2 --rounds 2",
    ),
    Part(
        name="fashion_mnist",
        config="vision/digits.yaml",
        dataset="fashion_mnist",
        says="Fashion-MNIST, clothing of 28x28 pixels: 4,000 of its 60,000 training images, twice over. The sparse\n"
        "model and the dense one of equal FLOPs at one learning rate, with 3 seeds; all 10,000 test images.",
        title="Sparse and dense on a part of Fashion-MNIST",
        arguments="--data.dataset fashion_mnist --data.subset 4000 --data.val_size 1000 --model.vit.patch_size 7 "
        "--trainer.max_epochs 2 --seeds 3 --rounds 2 --baselines dense_equal_flops --learning_rates 0.004",
    ),
    Part(
        name="census_income",
        config="recsys/census_income.yaml",
        dataset="census_income",
        says="Census-Income, 39 columns of 199,523 people: who earns above 50,000, and who was never married? A gate\n"
        "for each task over 8 experts; one network for both tasks, one for each, of equal FLOPs; boosted trees and\n"
        "logistic regression of scikit-learn. 100,000 rows of the training, with 2 seeds; the whole test.",
        title="Gated experts, one network, and trees on Census-Income",
        arguments="--data.subset 100000 --trainer.max_epochs 2 --seeds 2 --rounds 1 --learning_rates 0.006 --baselines "
        "shared_bottom_equal_flops single_task_equal_flops hist_gradient_boosting_untuned logistic_regression",
    ),
    Part(
        name="software_en_de",
        config="nlp/software_en_de.yaml",
        dataset="gramps",
        says="English to German: 2,606 short sentences from a program's windows to learn from, 144 to be tested on. A\n"
        "transformer with 8 experts, 2 a subword, in two of its four layers, and the dense one of equal FLOPs.",
        title="Sparse and dense translation of software strings",
        arguments="--seeds 1 --rounds 1 --baselines dense_equal_flops --learning_rates 0.004",
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.

    Args:
        argv: ``--output DIR`` (default runs/demo); further arguments, such as ``--trainer.max_epochs 1``, go to each
            comparison.

    Returns:
        0; 1 for what goes wrong, 130 for an interrupt, 143 for a termination, each with one line on stderr.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] in (["-h"], ["--help"]):
        print("usage: python -m apps.demo [--output DIR] [options of moesaic compare]")
        return 0
    show_traceback = "--traceback" in args
    args = [a for a in args if a != "--traceback"]
    try:
        rest, options = take(args, ("output",))
        return _run(Path((options["output"] or ["runs/demo"])[-1]), rest)
    except (KeyboardInterrupt, SystemExit) as stop:
        return stopped(stop, "; make demo goes on from here")
    except Exception as error:
        return failed(error, show_traceback)


def _run(output: Path, extra: Sequence[str]) -> int:
    began = time.monotonic()
    print("moesaic demo: sparse and dense models of equal cost, on real data.", flush=True)
    from apps.compare.command import command_line, run_command
    from apps.data import datasets
    from apps.data.cache import DataError
    from apps.report.page import FILE, write_page

    pages: dict[str, Page] = {}
    for part in PARTS:
        if pages and time.monotonic() - began > ENOUGH_SECONDS:
            print(f"\n{part.name} is left out, to stay short on this machine.")
            continue
        try:
            datasets.prepare(part.dataset)
        except DataError as error:
            print(f"\n{part.name} is left out: {' '.join(str(error).split())}")
            continue
        own = ("--jobs", str(min(2, os.cpu_count() or 1)), "--output", str(output / part.name))
        argv = [str(CONFIGS / part.config), *part.arguments.split(), *own, *extra]
        print(f"\n{part.says}\n\n{command_line(argv)}\n", flush=True)
        pages[part.says] = run_command(argv, part.title).page
    if not pages:
        raise ValueError("none of the demo's datasets could be had")
    print(f"\nDone in {time.monotonic() - began:.0f} s. All of it is on one page:")
    write_page(_page(pages), output / FILE)
    return 0


def _page(pages: Mapping[str, Page]) -> Page:
    """Return one page over all comparisons, each with what it says of itself, its verdict, figures and sections."""
    from apps.base.machine import moment
    from apps.report.page import Page, Section, Text

    sections = []
    for says, page in pages.items():
        figures = () if page.figures is None else (page.figures,)
        about = Text((" ".join(says.split()),))
        sections.append(Section(page.title, (about, Text(page.verdict), *figures), page.sections))
    count = len(pages)
    first = f"Sparse and dense models of equal cost, in {count} comparison{'s' if count > 1 else ''} on real data."
    verdict = (first, *(f"{page.title}. {page.verdict[0]}" for page in pages.values() if page.verdict))
    entries = tuple(entry for page in pages.values() for entry in page.entries)
    return Page("moesaic demo", verdict, None, tuple(sections), "demo", moment(), entries)


if __name__ == "__main__":
    sys.exit(main())
