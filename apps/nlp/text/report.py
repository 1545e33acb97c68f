"""What the test reports of models that write texts have in common: learning curves, and batches that are run again."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer

from apps.data.loader import batches_of_test
from apps.report.base import Report, ReportConfig, report_folder
from apps.report.curves import learning_curves, read_curves
from apps.report.plots import save_picture
from core.parallel import needs_all_ranks

_logger = logging.getLogger(__name__)


class WrittenReport(Report):
    """Base of the reports of models that write texts; after a training too it draws its learning curves.

    Attributes:
        config: what to do.
        written: what the model writes, such as "translations".
        of_batches: what of the report needs the test's batches once more.
    """

    config: ReportConfig
    written: ClassVar[str]
    of_batches: ClassVar[str]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.config.pictures:
            with report_folder(trainer) as folder:
                self.write_curves(pl_module, Path(trainer.default_root_dir), folder)

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

    def write_curves(self, module: Any, run: Path, folder: Path) -> None:
        """Draw the curves of a run's ``metrics.csv`` as ``learning_curves.png``; nothing where it has none."""
        smoothing = float(getattr(module, "label_smoothing", 0.0))
        smoothed = f" (label smoothing {smoothing:g})" if smoothing else ""
        panels = {
            "loss": {f"train{smoothed}": "train/loss", "validation": "val/loss"},
            f"validation {self.written}": {"BLEU": "val/bleu", "chrF++": "val/chrf"},
            "most loaded expert over the mean": {
                "train": "routing/load_imbalance",
                "validation": "val/routing/load_imbalance",
            },
        }
        curves = read_curves(run / "metrics.csv", panels)
        if curves:
            save_picture(learning_curves(curves, "Learning curves", best="BLEU"), folder / "learning_curves.png")
