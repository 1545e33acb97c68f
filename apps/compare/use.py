"""What the sparse model of a comparison uses its experts for: its app's test report, made once and kept."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Trainer

from apps.base.quiet import quiet
from apps.compare.experiment import Experiment
from apps.compare.systems import SPARSE
from apps.compare.training import interruptible
from apps.report.base import FOLDER, ReportConfig
from apps.report.page import SECTIONS, Section, load_sections, save_sections
from apps.train.step.module import SparseModule
from apps.train.watch.progress import PassBar

EXAMPLES = 2000
"""Test examples that are enough to tell which expert takes what, to the end of a batch."""


def sections_of_use(experiment: Experiment, checkpoint: Path, output: Path) -> Sequence[Section]:
    """Return the sections of the app's test report on the sparse model; its files are in ``output/report``.

    They are made of the first test examples, without the slower parts of the report, where there are none that are as
    new as ``checkpoint``. A module without a report has none.
    """
    folder = output / FOLDER
    if not _is_new(folder / SECTIONS, checkpoint):
        with quiet(own_notes=False), contextlib.redirect_stdout(io.StringIO()):  # the page has its warnings
            _test(experiment, checkpoint, output)
        if not _is_new(folder / SECTIONS, checkpoint):
            save_sections([], folder)
    return load_sections(folder)


def _is_new(path: Path, checkpoint: Path) -> bool:
    return path.exists() and path.stat().st_mtime_ns >= checkpoint.stat().st_mtime_ns


def _test(experiment: Experiment, checkpoint: Path, output: Path) -> None:
    """Test the sparse model with its report, if it has one."""
    module, data = experiment.build(SPARSE)
    if not isinstance(module, SparseModule) or not module.report_callbacks():
        return
    config = getattr(module, "report", None)
    if isinstance(config, ReportConfig):
        module.report = config.brief()  # type: ignore[assignment]
    options = {
        **experiment.trainer_options,
        "limit_test_batches": _limit(experiment, getattr(data, "eval_batch_size", None)),
    }
    trainer = Trainer(
        **options,
        logger=False,
        callbacks=PassBar(),
        default_root_dir=str(output),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    with interruptible(trainer):
        trainer.test(module, datamodule=data, ckpt_path=str(checkpoint), verbose=False, weights_only=True)


def _limit(experiment: Experiment, batch_size: int | None) -> float | int:
    """Return the limit of the test's batches: the configuration's, else those that have ``EXAMPLES``, else all."""
    limit: float | int | None = experiment.trainer_options.get("limit_test_batches")
    if limit is None:
        return 1.0 if batch_size is None else math.ceil(EXAMPLES / batch_size)
    return limit
