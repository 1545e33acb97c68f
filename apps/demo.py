"""``make demo``: sparse and dense models of equal cost on images, a table, text, and images with texts, on 2 cores.

It runs ``moesaic compare`` on the handwritten digits that come with scikit-learn, on synthetic shapes with texts, and
on Fashion-MNIST, Census-Income and the strings of a program where they can be had, with few steps and seeds, and ends
with one report over all of them.
A slow machine trains for less, by its measured speed, so that no part is left out. What is finished is not done again.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from apps.base.files import CONFIGS, read_json, write_json
from apps.base.messages import counted
from apps.base.progress import Bar, bar, say
from apps.cli.errors import failed, stopped
from apps.cli.parser import Parser

if TYPE_CHECKING:
    from apps.report.page import Page

MOST_SECONDS = 290.0
"""All parts together take no longer where less training can see to it."""

LEAST_SHARE = 0.05
"""Share of its training that a part has at least, on however slow a machine."""

STEP_SECONDS = 0.0075
"""Seconds of a step of ``slowness`` on the machine that the parts' seconds are of."""

SHARES = "shares.json"


@dataclass(frozen=True)
class Part:
    """One comparison of the demo.

    Attributes:
        name: name of its folder.
        config: path below ``configs/``.
        dataset: name of the dataset, without which the part is left out.
        says: text that announces the part, with ``{amount}`` for the number of ``scaled``.
        title: title of its table and pictures.
        arguments: options after ``moesaic compare CONFIG``; ``scaled``, ``--output`` and ``--jobs`` are added.
        scaled: the option that a slow machine has less of, its number, and the least one.
        seconds: seconds on two cores of an AMD EPYC: those that do not depend on ``scaled``, and the others; of digits
            and Fashion-MNIST a Xeon's, divided by 1.4, as much longer as both its cores take.
    """

    name: str
    config: str
    dataset: str
    says: str
    title: str
    arguments: str
    scaled: tuple[str, int, int]
    seconds: tuple[float, float]

    def amount(self, share: float) -> int:
        """Return the number of ``scaled`` for a share of it."""
        return max(self.scaled[2], round(share * self.scaled[1]))

    def expected(self, share: float) -> float:
        """Return the seconds that it takes with a share of its training, where the parts' seconds are measured."""
        return self.seconds[0] + share * self.seconds[1]


PARTS = (
    Part(
        name="digits",
        config="vision/digits.yaml",
        dataset="digits",
        says="1,797 handwritten digits of 8x8 pixels. A convolutional network with 8 experts, 2 a position of its\n"
        "last grid; a dense one of equal FLOPs; a dense one of equal parameters. Each tries 3 learning rates in\n"
        "short runs, and is then trained for {amount} epochs with 3 seeds.",
        title="Sparse and dense on digits",
        arguments="--seeds 3 --search_share 0.3 --rounds 1",
        scaled=("--trainer.max_epochs", 7, 2),
        seconds=(16.0, 30.0),
    ),
    Part(
        name="fashion_mnist",
        config="vision/fashion_mnist.yaml",
        dataset="fashion_mnist",
        says="Fashion-MNIST, clothing of 28x28 pixels: {amount:,} of its 60,000 training images, 3 times over. The\n"
        "sparse model and the dense one of equal FLOPs at one learning rate, with 3 seeds; all 10,000 test images.",
        title="Sparse and dense on a part of Fashion-MNIST",
        arguments="--data.val_size 0.15 --data.batch_size 64 --model.conv.widths [24,48,96] --trainer.max_epochs 3 "
        "--seeds 3 --rounds 1 --baselines dense_equal_flops --learning_rates 0.01",
        scaled=("--data.subset", 2500, 400),
        seconds=(30.0, 22.0),
    ),
    Part(
        name="census_income",
        config="recsys/census_income.yaml",
        dataset="census_income",
        says="Census-Income, 39 columns of 199,523 people: who earns above 50,000, and who was never married? A gate\n"
        "for each task over 8 experts; one network for both tasks, one for each, of equal FLOPs; boosted trees and\n"
        "logistic regression of scikit-learn. {amount:,} rows of the training, with 2 seeds; the whole test.",
        title="Gated experts, one network, and trees on Census-Income",
        arguments="--trainer.max_epochs 2 --seeds 2 --rounds 1 --learning_rates 0.006 --baselines "
        "shared_bottom_equal_flops single_task_equal_flops hist_gradient_boosting_untuned logistic_regression",
        scaled=("--data.subset", 60000, 5000),
        seconds=(28.0, 32.0),
    ),
    Part(
        name="software_en_de",
        config="nlp/software_en_de.yaml",
        dataset="gramps",
        says="English to German: 2,606 short sentences from a program's windows to learn from in {amount} epochs,\n"
        "144 to be tested on. A transformer with 8 experts, 2 a subword, in two of its four layers, and the dense one\n"
        "of equal FLOPs.",
        title="Sparse and dense translation of software strings",
        arguments="--seeds 1 --rounds 1 --baselines dense_equal_flops --learning_rates 0.004",
        scaled=("--trainer.max_epochs", 7, 2),
        seconds=(17.0, 32.0),
    ),
    Part(
        name="shapes",
        config="multimodal/shapes.yaml",
        dataset="shapes",
        says="2,000 synthetic shapes and a sentence on each, read in {amount} epochs: which of 250 new images does a\n"
        "new sentence describe? One transformer reads both, with 8 experts, 2 a patch or subword, in one of its\n"
        "two blocks; and the dense one of equal FLOPs.",
        title="Sparse and dense on images with sentences",
        arguments="--seeds 1 --rounds 1 --baselines dense_equal_flops --learning_rates 0.005",
        scaled=("--trainer.max_epochs", 5, 2),
        seconds=(19.0, 12.0),
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
    parser = Parser(prog="python -m apps.demo", epilog="Further options are those of moesaic compare.")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo"), metavar="DIR", help="folder (default: runs/demo)"
    )
    show_traceback = "--traceback" in args
    args = [a for a in args if a != "--traceback"]
    try:
        options, rest = parser.parse_known_args(args)
        return _run(options.output, rest)
    except (KeyboardInterrupt, SystemExit) as stop:
        return stopped(stop, "; make demo continues from here")
    except Exception as error:
        return failed(error, show_traceback)


def _run(output: Path, extra: Sequence[str]) -> int:
    began = time.monotonic()
    print("moesaic demo: sparse and dense models of equal cost, on real data.", flush=True)
    pages: dict[str, Page] = {}
    with bar("demo") as whole:
        from apps.report.page import FILE, write_page

        pace = Pace(began, slowness())
        for number, part in enumerate(PARTS, 1):
            whole.name = f"demo, part {number} of {len(PARTS)}"
            page = _compared(part, PARTS[number:], output, extra, pace, whole)
            if page is not None:
                pages[page[0]] = page[1]
    if not pages:
        raise ValueError("none of the demo's datasets could be had")
    print(f"\nDone in {time.monotonic() - began:.0f} s. All of it is on one page:")
    write_page(_page(pages), output / FILE)
    return 0


@dataclass
class Pace:
    """How fast this machine is, and what it can still do in time.

    Attributes:
        began: time of ``time.monotonic`` at which the demo began.
        slow: how many times longer than its ``seconds`` a part takes.
        spent, expected: seconds of the parts until now, and those that they would take where ``slow`` is 1.
    """

    began: float
    slow: float
    spent: float = 0.0
    expected: float = 0.0

    def share(self, parts: Sequence[Part]) -> float:
        """Return the share of their training with which ``parts`` are finished within ``MOST_SECONDS``."""
        left = (MOST_SECONDS - (time.monotonic() - self.began)) / self.slow
        fixed, scaled = (sum(part.seconds[i] for part in parts) for i in (0, 1))
        return min(1.0, max(LEAST_SHARE, (left - fixed) / scaled))

    def took(self, part: Part, share: float, seconds: float) -> None:
        """Take note of a part's seconds: they tell more of the machine than ``slowness``."""
        self.spent, self.expected = self.spent + seconds, self.expected + part.expected(share)
        self.slow = self.spent / self.expected


def _compared(
    part: Part, later: Sequence[Part], output: Path, extra: Sequence[str], pace: Pace, whole: Bar
) -> tuple[str, Page] | None:
    """Return what a part says of itself, and the page of its comparison; None where its data cannot be had."""
    from apps.compare.command import command_line, run_command
    from apps.data import datasets
    from apps.data.cache import DataError

    try:
        datasets.prepare(part.dataset)
    except DataError as error:
        say(f"\n{part.name} is left out: {' '.join(str(error).split())}")
        return None
    shares: dict[str, float] = read_json(output / SHARES) or {}
    is_new = part.name not in shares
    share = pace.share((part, *later)) if is_new else shares[part.name]
    write_json(output / SHARES, {**shares, part.name: share})
    whole.total = whole.done + sum(one.expected(share) for one in (part, *later))
    amount = part.amount(share)
    own = (part.scaled[0], str(amount), "--jobs", str(min(2, os.cpu_count() or 1)), "--output", str(output / part.name))
    argv = [str(CONFIGS / part.config), *part.arguments.split(), *own, *extra]
    says = part.says.format(amount=amount)
    say(f"\n{says}\n\n{command_line(argv)}\n")
    if share < 1:
        say(f"This machine takes {pace.slow:.1f} times as long as planned: {share:.0%} of the training has to do.\n")
    began, expected = time.monotonic(), part.expected(share)
    with whole.weighing(expected) if is_new else nullcontext():
        page = run_command(argv, part.title).page
    if is_new:
        pace.took(part, share, time.monotonic() - began)
    else:  # an earlier run has done it, or a part of it
        whole.skip(expected)
    return says, page


def slowness() -> float:
    """Return how many times longer a step of a small sparse layer takes than where the parts' seconds are of."""
    import torch

    import core

    layer = core.MoEConfig(8, core.TokenChoice(top_k=2), core.FFN(128)).build(64)
    x = torch.ones(1024, 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))  # as many as each of two runs at a time has
    try:
        seconds = []
        for _ in range(40):
            began = time.perf_counter()
            layer(x).square().mean().backward()
            seconds.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    cores = min(2, os.cpu_count() or 1)
    return sum(seconds[10:]) / len(seconds[10:]) / STEP_SECONDS * 2 / cores


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
    first = f"Sparse and dense models of equal cost, in {counted(count, 'comparison')} on real data."
    verdict = (first, *(f"{page.title}. {page.verdict[0]}" for page in pages.values() if page.verdict))
    entries = tuple(entry for page in pages.values() for entry in page.entries)
    return Page("moesaic demo", verdict, None, tuple(sections), "demo", moment(), entries)


if __name__ == "__main__":
    sys.exit(main())
