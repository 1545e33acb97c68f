"""What ``moesaic test`` adds to the metrics: which digit is taken for which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apps.data.loader import batches_of_test
from apps.report.base import Report
from apps.report.classified import Answers
from apps.report.page import Section


class LinearReport(Report):
    def collect(self, trainer: Any, pl_module: Any) -> Answers:
        answers = Answers(10)
        for batch in batches_of_test(trainer):
            answers.add(pl_module(batch.image.to(pl_module.device)), batch.label)
        return answers

    def write(self, collected: Answers, folder: Path) -> list[Section]:
        return [Section("Answers", tuple(collected.parts("0123456789")))]
