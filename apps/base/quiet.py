"""``quiet`` leaves out what Lightning and its libraries print if it does not help.

The commands run inside it, and a script with a Trainer of its own may too: an import silences nothing.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

# Advice that does not apply here: data in memory needs no workers, short epochs are logged by step, promotions.
_UNHELPFUL_WARNINGS = (
    ".*does not have many workers.*",
    ".*is smaller than the logging interval.*",
    ".*treespec, LeafSpec.*",
    ".*LeafSpec.*is deprecated.*",
    ".*litlogger.*",
    ".*litmodels.*",
    ".*`isinstance\\(treespec.*",
    ".*no logger configured.*",
    "Checkpoint directory .* exists and is not empty.*",  # of a run that resumes
    ".*Trying to infer the `batch_size`.*",
    "`?torch.distributed.* is deprecated.*",  # TorchRec's calls
)


@contextlib.contextmanager
def quiet(own_notes: bool = True) -> Iterator[None]:
    """Leave out Lightning's notes, tips and advertisements, and the warnings that do not help here.

    Args:
        own_notes: print our own notes; False leaves them out, and every warning of Lightning's.

    Example::

        with quiet():
            trainer = lightning.pytorch.Trainer(max_epochs=5)    # its constructor speaks too
            trainer.fit(model, data)
    """
    names = ("lightning.pytorch", "lightning.fabric", "lightning")
    levels = {name: logging.getLogger(name).level for name in names}
    # FBGEMM logs at its import, which would give the root logger a handler that repeats our notes.
    nothing = logging.NullHandler()
    logging.getLogger().addHandler(nothing)
    own, handler = logging.getLogger("apps"), _Notes()
    handler.setFormatter(logging.Formatter("%(message)s"))
    own_level = own.level
    for name in levels:
        logging.getLogger(name).setLevel(logging.WARNING if own_notes else logging.ERROR)
    own.setLevel(logging.INFO if own_notes else logging.ERROR)
    if own_notes:
        own.addHandler(handler)
    try:
        with warnings.catch_warnings(), _quiet_event_writer():
            for pattern in _UNHELPFUL_WARNINGS:
                warnings.filterwarnings("ignore", pattern)
            if not own_notes:
                warnings.filterwarnings("ignore", module=r"lightning\.")
                warnings.filterwarnings("ignore", ".*(num_workers|lr_scheduler\\.step).*")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        own.removeHandler(handler)
        logging.getLogger().removeHandler(nothing)
        own.setLevel(own_level)


class _Notes(logging.Handler):
    """Prints notes to the stderr of the moment: while a progress bar runs, rich prints them above it.

    (Rich itself would print to the bar's file, stdout, also if stderr is another one.)
    """

    def emit(self, record: logging.LogRecord) -> None:
        stream: Any = sys.stderr
        own = getattr(stream, "rich_proxied_file", stream)
        print(self.format(record), file=stream if own.isatty() else own, flush=True)


@contextlib.contextmanager
def _quiet_event_writer() -> Iterator[None]:
    """Hide the traceback of TensorBoard's writing thread, whose error the next call of its writer raises."""
    shown = threading.excepthook

    def hook(met: threading.ExceptHookArgs) -> None:
        if type(met.thread).__name__ != "_AsyncWriterThread":
            shown(met)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = shown
