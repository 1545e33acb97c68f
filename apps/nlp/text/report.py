"""The common parts of the test reports of models that write texts: learning curves, and batches that are run again."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer

from apps.data.loader import batches_of_test
from apps.report.base import Report, ReportConfig, report_folder
from apps.report.page import LineChart, save_charts
from apps.report.page.training import training_section
from core.parallel import needs_all_ranks

_logger = logging.getLogger(__name__)


class WrittenReport(Report):
    """Base of the reports of models that write texts; after a training too it draws its learning curves.

    Attributes:
        config: what to do.
        of_batches: what of the report needs the test's batches once more.
    """

    config: ReportConfig
    of_batches: ClassVar[str]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.config.pictures:
            with report_folder(trainer) as folder:
                self.write_curves(Path(trainer.default_root_dir), folder)

    def batches(self, trainer: Trainer, pl_module: LightningModule) -> list[Any]:
        """Return the test's batches on the first process; none where processes share the model, as the log says."""
        if not trainer.is_global_zero:
            return []
        if needs_all_ranks(pl_module):
            _logger.info(
                "%s are left out, since processes share the model: test with --trainer.devices 1 for them",
                self.of_batches,
            )
            return []
        return list(batches_of_test(trainer))

    def write_curves(self, run: Path, folder: Path) -> None:
        """Draw the course of a run's training as ``learning_curves.png``; nothing if it has none."""
        charts = [part for part in training_section(run / "metrics.csv").parts if isinstance(part, LineChart)]
        if charts:
            save_charts(charts, folder / "learning_curves.png", "Learning curves")
