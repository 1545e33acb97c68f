"""``apps.base.quiet``: a script with a Trainer of its own hears what the commands' users hear."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from tiny_app import TinyData, TinyModule

from apps.base.quiet import quiet


def train_and_test(folder: Path) -> None:
    options = {"enable_model_summary": False, "enable_progress_bar": False, "default_root_dir": folder}
    trainer = Trainer(accelerator="cpu", max_epochs=1, **options)
    trainer.fit(TinyModule(3), TinyData(n=24))
    trainer.test(TinyModule(3), TinyData(), ckpt_path=trainer.checkpoint_callback.best_model_path, verbose=False)


def test_a_script_hears_our_notes_alone(tmp_path, capfd, caplog, recwarn):
    logger = logging.getLogger("lightning.pytorch")
    before = (logger.level, list(warnings.filters))
    with quiet():
        train_and_test(tmp_path)
    out, err = capfd.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("TinyModule: ")
    assert not [r for r in caplog.records if r.name.startswith("lightning")]
    assert not [w for w in recwarn.list if "lightning" in str(w.filename)]
    assert (logger.level, list(warnings.filters)) == before  # and all is as it was


def test_without_it_lightning_advertises(tmp_path, caplog):
    """Else the test above would prove nothing."""
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train_and_test(tmp_path)
    if not any("litlogger" in record.getMessage() for record in caplog.records):
        pytest.fail("Lightning has stopped advertising: quiet may be shorter")
