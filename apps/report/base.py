"""The base of the test reports: their common options, when they are made, and the folder of their files."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer

from apps.base.files import folder_beside
from apps.report.page import SECTIONS, Section, save_sections
from apps.report.page.html import check_addresses
from core.fields import Checked, CountOrZero

_logger = logging.getLogger(__name__)

FOLDER = "report"
"""The folder of a report's files in the folder of its run."""

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class ReportConfig(Checked):
    """Options of the report that ``moesaic test`` adds to the metrics of a model; each app adds fields of its own.

    Attributes:
        routing_examples: test examples from which the routing is read, to the end of a batch; 0 reads none.
        pictures: write pictures next to the tables.

    Raises:
        ValueError: a number out of its range.
    """

    prefix = "report."

    routing_examples: CountOrZero = 20_000
    pictures: bool = True

    def brief(self) -> Self:
        """Return the options of a report without its slower parts, such as a comparison makes of its sparse model."""
        return self


class Report(Callback):
    """The report of a test: collected by all processes, written by the first one into ``<run folder>/report``.

    A subclass brings ``collect`` and ``write``. The files appear together when all are written, so an error leaves the
    report of an earlier test as it was.

    Args:
        config: the options; None: there are none.
    """

    def __init__(self, config: Any = None) -> None:
        self.config = config

    def collect(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        """Return the argument of ``write``; None writes nothing. All processes call it: a sharded model needs them."""
        raise NotImplementedError(f"{type(self).__name__} must define collect(trainer, pl_module)")

    def write(self, collected: Any, folder: Path) -> Sequence[Section]:
        """Write the files into ``folder``, and return the parts of the run's HTML page that show them.

        Pictures in ``folder`` go by their names only.
        """
        raise NotImplementedError(f"{type(self).__name__} must define write(collected, folder)")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if getattr(self.config, "pictures", False):
            check_addresses(", or model.report.pictures=false")  # now, not when all examples are through

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        collected = self.collect(trainer, pl_module)
        if collected is not None and trainer.is_global_zero:
            with report_folder(trainer) as folder:
                sections = [section for section in self.write(collected, folder) or () if not section.is_empty]
                if sections:
                    save_sections(sections, folder)


def is_left_out(trainer: Trainer) -> bool:
    """Return whether a report of one process is left out, as each of several has a share of the examples, and of a
    sharded model a share of that; the first process says so."""
    if trainer.world_size == 1:
        return False
    if trainer.is_global_zero:
        _logger.info("the report is left out with several processes: test with --trainer.devices 1 for it")
    return True


@contextlib.contextmanager
def report_folder(trainer: Trainer) -> Iterator[Path]:
    """Give an empty folder, and move its files into ``<run folder>/report`` when the block has ended without an error.

    The log then names them.
    """
    folder = Path(trainer.default_root_dir) / FOLDER
    with folder_beside(folder) as new:
        yield new
        names = sorted(path.name for path in new.iterdir())
        if names:
            folder.mkdir(exist_ok=True)
            for name in names:
                os.replace(new / name, folder / name)
        if shown := [name for name in names if name != SECTIONS]:
            _logger.info(f"{folder}: {', '.join(shown)}")


def computed_metrics(pl_module: Any, kind: type[Kind]) -> Kind | None:
    """Return the test's metrics, computed; None if they have another kind.

    Every process must call it, for computing gathers. The module's own call then reads the cached result.
    """
    metrics = pl_module.stage_metrics("test")
    if not isinstance(metrics, kind):
        return None
    metrics.compute()  # type: ignore[attr-defined]
    return metrics


def first_batches(batches: Iterable[Any], examples: int, size: Callable[[Any], int] = len) -> Iterator[Any]:
    """Yield whole batches until at least ``examples`` came; ``size`` counts a batch's examples."""
    seen = 0
    for batch in batches:
        if seen >= examples:
            return
        yield batch
        seen += size(batch)


def spread_places(count: int, wanted: int) -> list[int]:
    """Return at most ``wanted`` places among ``count``, at equal steps: the middles of as many parts."""
    wanted = min(count, wanted)
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]


def spread_batches(batches: Sequence[Any], examples: int) -> list[Any]:
    """Return batches at equal steps, of about so many examples: the first ones may all be of one length or document.

    Args:
        batches: all of them; ``index_B`` of each numbers its examples.
        examples: how many; 0 returns none.
    """
    if not examples or not batches:
        return []
    total = sum(len(batch.index_B) for batch in batches)
    wanted = max(1, round(len(batches) * examples / max(total, 1)))
    return [batches[place] for place in spread_places(len(batches), wanted)]
