"""``Partial``: the finished part of a file, from which a run like the stopped one continues."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from apps.base.files import holding, new_file, replacing
from apps.registry import differences

log = logging.getLogger(__name__)

_SAVED = 1.0
"""Least time in seconds between two notes of how far a file is."""


class Partial:
    """The lines that a file has so far, and how far they are known to be whole.

    The lines are in ``PATH.partial``; ``PATH.partial.json`` has the model, inputs and options that they depend on.

    Args:
        path: path of the whole file.
        made_of: plain values that the lines depend on; None: no run can continue with them, and an error leaves
            nothing.
        overwrite: whether to start over if the lines depend on other values.
        compatible_values: values of the earlier lines that any other may follow, by name.

    Attributes:
        file: the open file, at its end.
        start: number of inputs that the file already has when it is opened.

    Raises:
        ValueError: the lines come from another run, or a run writes them now.
    """

    def __init__(
        self,
        path: Path,
        made_of: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        compatible_values: Mapping[str, Any] | None = None,
    ) -> None:
        self.made_of, self.compatible_values, self.start = made_of, compatible_values or {}, 0
        self.state = path.with_name(f"{path.name}.partial.json")
        self._whole = {"inputs": 0, "bytes": 0}
        self._saved = time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        # A file that no run can continue is hidden.
        self.path = new_file(path) if made_of is None else path.with_name(f"{path.name}.partial")
        with contextlib.ExitStack() as held:
            if made_of is not None:
                held.enter_context(_held(self.path))
            is_new = made_of is None or not self.path.exists()
            if self.path.is_symlink():
                raise ValueError(f"{self.path} is a link, and its lines would go elsewhere: take it away")
            self.file = held.enter_context(open(self.path, "a+b"))
            if made_of is not None:
                self._go_on(self._known(), is_new, overwrite)
            self._stack = held.pop_all()
        if self.start:
            log.info("going on after %s predictions of %s", f"{self.start:,}", self.path)

    def _known(self) -> dict[str, Any] | None:
        """Return the state of the file; None if no state fits it."""
        try:
            known = json.loads(self.state.read_text("utf-8"))
            fits = known["bytes"] <= self.path.stat().st_size and isinstance(known["made_of"], dict)
            return known if fits and isinstance(known["inputs"], int) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _go_on(self, known: dict[str, Any] | None, is_new: bool, overwrite: bool) -> None:
        assert self.made_of is not None
        difference = None if known is None else _difference(known["made_of"], self.made_of, self.compatible_values)
        if not is_new and not overwrite:
            if known is None and self.path.stat().st_size:
                raise ValueError(f"{self.path} is there, and {self.state.name} is not: take it away")
            if difference is not None:
                raise ValueError(
                    f"{self.path} is of another run, whose {difference}: take it away, overwrite it, or give another "
                    "output"
                )
            if known is not None and known["inputs"] and self.made_of.get("input") == ["-"]:
                raise ValueError(f"{self.path} is of standard input, which cannot be read twice: take it away")
        if known is not None and difference is None and known["inputs"]:
            self.start = known["inputs"]
            self.file.truncate(known["bytes"])
        else:
            self.file.truncate(0)
        self._keep(self.start)
        self._note()

    def save(self, inputs: int) -> None:
        """Keep the lines so far as the lines of so many inputs; this is noted now and then."""
        self._keep(inputs)
        if time.monotonic() - self._saved > _SAVED:
            self._note()

    def _keep(self, inputs: int) -> None:
        self.file.flush()
        self._whole = {"inputs": inputs, "bytes": os.fstat(self.file.fileno()).st_size}

    def _note(self) -> None:
        os.fsync(self.file.fileno())
        with replacing(self.state) as file:
            file.write(json.dumps({**self._whole, "made_of": self.made_of}) + "\n")
        self._saved = time.monotonic()

    def become(self, path: Path) -> None:
        """Move the lines to ``path``, as the whole file."""
        self.file.flush()
        os.fsync(self.file.fileno())
        os.replace(self.path, path)

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        with self._stack:
            try:
                if kind is not None and self._whole["inputs"]:
                    self.file.flush()
                    self._note()
                    done = f"{self._whole['inputs']:,} predictions"
                    log.info("%s are in %s: a run like this one continues after them", done, self.path)
                    return
            finally:
                with contextlib.suppress(OSError):  # a full disk raises once more
                    self.file.close()
            self.path.unlink(missing_ok=True)
            if self.made_of is not None:
                self.state.unlink(missing_ok=True)


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """Hold the lock of ``path`` inside, by a hidden file next to it that is removed in the end."""
    lock = path.with_name(f".{path.name}.lock")
    with holding(lock, f"another run is writing {path}"):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows removes it once it is free
                lock.unlink()


def _difference(
    known: Mapping[str, Any], made_of: Mapping[str, Any], compatible_values: Mapping[str, Any]
) -> str | None:
    """Return the first value that differs, with both; None if there is none."""
    for name, a, b in differences(known, made_of):
        if name not in compatible_values or a != compatible_values[name]:
            part = name.partition(".")[0]
            is_named_alone = part in ("weights", "model", "database", "input")
            return f"{part} is not this one's" if is_named_alone else f"{name} is {a}, not {b}"
    return None
