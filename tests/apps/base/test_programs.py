"""What a program imports, hears and listens at."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from places import environment
from tiny_app import TinyData, TinyModule

from apps.base.ports import bound, check_port, is_local, url_of
from apps.base.quiet import quiet

PROGRAM = """
import gc
from apps.base.imports import importing
states = [gc.isenabled()]
try:
    with importing():
        states.append(gc.isenabled())
        imported = []
        raise ImportError("as a wrong class in a configuration")
except ImportError:
    states.append(gc.isenabled())
count, tracked = gc.get_freeze_count(), any(o is imported for o in gc.get_objects())
later = []
with importing():
    states.append(gc.isenabled())
print(states, count > 1000, tracked, gc.get_freeze_count() == count, any(o is later for o in gc.get_objects()))
"""


def test_only_the_first_imports_of_a_program_are_kept_from_collection():
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    # On, off for the imports, on again, and on in a second call; the list made among the imports is out of reach.
    assert done.stdout == "[True, False, True, True] True False True True\n"


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


def test_a_free_port_one_in_use_and_a_number_that_is_none():
    with bound(0) as listening:
        port = listening.getsockname()[1]
        assert url_of(listening) == f"http://127.0.0.1:{port}"
        with pytest.raises(ValueError, match=rf"^port={port} cannot be used \(Address already in use\)"):
            check_port(port)
    check_port(port)
    with pytest.raises(ValueError, match=r"^port=65536 must be 0 to 65535$"):
        check_port(65536)


def test_hosts(monkeypatch):
    assert is_local("127.0.0.1")
    assert not is_local("0.0.0.0")
    with pytest.raises(ValueError, match=r"^host=192\.0\.2\.1 is no address of this machine$"):  # RFC 5737
        check_port(0, "192.0.2.1")

    def unknown(*arguments, **options):
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ValueError, match=r"^host=no\.such\.host is not known: "):
        is_local("no.such.host")
