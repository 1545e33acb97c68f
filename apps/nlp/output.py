"""Predictions of lines of text as they come: printed, or into a file that a stopped run goes on with."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TextIO

import torch
from torch import Tensor, nn

from apps.base.files import naming, replacing
from apps.nlp.decode import DecodeConfig
from apps.nlp.predict import Line
from core.config.plain import to_plain

log = logging.getLogger(__name__)

ENDINGS = (".txt", ".jsonl")
"""Endings of files of predictions: lines of text as they are printed, or a JSON object a line."""

_TERMINAL, _LOG = 1.0, 60.0
"""Seconds between two notes of progress, on a terminal and elsewhere."""
_SAVED = 1.0
"""Seconds, at least, between two notes of how far a file is."""


class LinePredictor:
    """A module that says something of each line of text: it brings ``predict_lines``, and gets the rest.

    Attributes:
        decode: how a line's candidates are found.
        predicts: what a line's best candidate is called in a file.
    """

    decode: DecodeConfig
    predicts: ClassVar[str] = "text"

    def predict_lines(self, data: Any, start: int = 0) -> Iterator[Line] | None:
        """Yield what the model says of each line of ``data.text`` or ``data.predict_file``, in their order.

        Nothing is computed before the first line is asked for, and no more than is needed for the next one.

        Args:
            data: the app's data module.
            start: lines before this one are passed over; a multiple of ``chunk_of(data)``.

        Returns:
            The lines; None where the data have neither text nor file.
        """
        raise NotImplementedError

    def chunk_of(self, data: Any) -> int:
        """How many lines are computed together, so that a run may go on after so many with the same result."""
        return 1

    def made_from(self, data: Any) -> dict[str, Any]:
        """Plain values that what is said of a line depends on, beside the weights and ``decode``."""
        return {}

    def predict_stream(self, data: Any) -> Iterator[str] | None:
        """The lines that ``moesaic predict`` prints: see ``as_text``; None where there is nothing to predict.

        Progress goes to stderr, where the lines themselves do not show it.
        """
        lines = self.predict_lines(data)
        if lines is None:
            return None
        hidden = not sys.stdout.isatty()
        return (
            text for line in watched(lines, num_lines(data) if hidden else None, hidden) for text in self._texts(line)
        )

    def _texts(self, line: Line) -> list[str]:
        return as_text(line, self.decode.num_best)

    def predict_into(self, data: Any, path: str | Path, overwrite: bool = False) -> str | None:
        """Write the predictions of ``data.text`` or ``data.predict_file`` to a file, and go on where a run was stopped.

        Until all is done the lines are in ``PATH.partial``, and ``PATH.partial.json`` says what they are of. A run of
        the same model, input and options goes on from there, to the same file as an unbroken one.

        Args:
            data: the app's data module.
            path: ends in ``.txt``, for lines as they are printed, or ``.jsonl``, for an object a line with the index,
                the source, the best candidate, all candidates and their scores.
            overwrite: replace an earlier file, and begin anew where the lines so far are another run's.

        Returns:
            A line that says what was done; None where the data have neither text nor file.

        Raises:
            ValueError: another ending, a file that is there, lines of another run, or a run that writes them now.
        """
        path = Path(path)
        if data.text is None and data.predict_file is None:
            return None
        if path.suffix not in ENDINGS:
            raise ValueError(f"output={path}: what is said of lines of text goes to a file in {' or '.join(ENDINGS)}")
        if path.exists() and not overwrite:
            raise ValueError(f"output={path} exists already: give another name, or take it away")
        is_json = path.suffix == ".jsonl"
        made = {
            "weights": fingerprint(self),  # type: ignore[arg-type]  # a module, in the end
            "input": identity_of(data),
            "decode": to_plain(self.decode, DecodeConfig),
            "bad_lines": data.bad_lines,
            **to_plain(self.made_from(data)),
        }
        with naming(path), Partial(path, made, overwrite) as partial:
            lines = self.predict_lines(data, partial.lines)
            assert lines is not None
            start, chunk = partial.lines, self.chunk_of(data)
            for line in watched(lines, num_lines(data), True, start):
                texts = [as_json(line, self.predicts)] if is_json else self._texts(line)
                partial.write("".join(f"{text}\n" for text in texts))
                if (line.index + 1) % chunk == 0:
                    partial.save(line.index + 1)
                partial.count = line.index + 1
        resumed = f", {start:,} of them by an earlier run" if start else ""
        return f"{partial.count:,} line{'s' * (partial.count != 1)} in {path}{resumed}"


def as_text(line: Line, num_best: int) -> list[str]:
    """A line's best candidate; of several, each with the line's number from 1 and its score before it, and tabs."""
    if num_best == 1:
        return [line.candidates[0].text]
    return [f"{line.index + 1}\t{score:.4f}\t{text}" for text, score in line.candidates]


def as_json(line: Line, predicts: str) -> str:
    """A line and all its candidates, as an object."""
    texts, scores = [c.text for c in line.candidates], [c.score for c in line.candidates]
    row = {"index": line.index, "source": line.source, predicts: texts[0], "candidates": texts, "scores": scores}
    return json.dumps(row, ensure_ascii=False)


class Partial:
    """The lines so far of a file that is being made, and how far they are known to be whole.

    Args:
        path: of the whole file.
        made: plain values that the lines depend on.
        overwrite: begin anew where the lines are of other values.

    Attributes:
        lines: of the input that the file already has when it is opened.
        count: of the input, in the end.

    Raises:
        ValueError: lines of another run, or a run that writes them now.
    """

    def __init__(self, path: Path, made: Mapping[str, Any], overwrite: bool) -> None:
        self.path, self.made, self.lines, self.count = path, dict(made), 0, 0
        self.partial = path.with_name(f"{path.name}.partial")
        self.state = path.with_name(f"{path.name}.partial.json")
        self._saved = time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.partial.exists()
        self._file = open(self.partial, "a+b")  # noqa: SIM115  # closed by __exit__
        try:
            _lock(self._file, self.partial)
            known = self._known()
            if not is_new and known is not None and not overwrite:
                self._check(known)
            if known is not None and not _difference(known["made"], self.made):
                self.lines = self.count = known["lines"]
            elif not is_new and known is None and self.partial.stat().st_size and not overwrite:
                raise ValueError(f"{self.partial} is there, and {self.state.name} is not: take it away")
            self._file.truncate(known["bytes"] if known is not None and self.lines else 0)
            self.save(self.lines, at_once=True)
        except BaseException:
            self._file.close()
            raise
        if self.lines:
            log.info("going on after %s lines of %s", f"{self.lines:,}", self.partial)

    def _known(self) -> dict[str, Any] | None:
        try:
            known = json.loads(self.state.read_text("utf-8"))
            whole = known["bytes"] <= self.partial.stat().st_size and isinstance(known["made"], dict)
            return known if whole and isinstance(known["lines"], int) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _check(self, known: Mapping[str, Any]) -> None:
        where = _difference(known["made"], self.made)
        if where is None and self.made["input"] == ["-"] and known["lines"]:
            raise ValueError(f"{self.partial} is of standard input, which cannot be read twice: take it away")
        if where is not None:
            raise ValueError(
                f"{self.partial} is of another run, whose {where}: take it away, overwrite it, or give another output"
            )

    def write(self, text: str) -> None:
        """Append text."""
        self._file.write(text.encode())

    def save(self, lines: int, at_once: bool = False) -> None:
        """Keep what there is, as that of so many lines of the input; noted now and then, unless it is to be at once."""
        self._file.flush()
        self._whole = {"lines": lines, "bytes": os.fstat(self._file.fileno()).st_size, "made": self.made}
        if at_once or time.monotonic() - self._saved > _SAVED:
            self._note()

    def _note(self) -> None:
        os.fsync(self._file.fileno())
        with replacing(self.state) as file:
            file.write(json.dumps(self._whole) + "\n")
        self._saved = time.monotonic()

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        with self._file:
            self._file.flush()
            if kind is not None and self._whole["lines"]:
                self._note()
                done = f"{self._whole['lines']:,} lines"
                log.info("%s are in %s: a run like this one goes on after them", done, self.partial)
                return
            if kind is not None:
                self.partial.unlink()
            else:
                os.fsync(self._file.fileno())
                os.replace(self.partial, self.path)
        with contextlib.suppress(FileNotFoundError):
            self.state.unlink()


def _lock(file: Any, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not a POSIX system: no lock
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another run is writing {path}") from None


def _difference(known: Mapping[str, Any], made: Mapping[str, Any]) -> str | None:
    """The first value that differs, with both; None where there is none."""
    for name in dict.fromkeys((*known, *made)):
        a, b = known.get(name), made.get(name)
        if name == "bad_lines" and a == "error":
            continue  # it met none so far
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            if (where := _difference(a, b)) is not None:
                return f"{name}.{where}"
        elif a != b:
            return f"{name} is not this one's" if name in ("weights", "input") else f"{name} is {a}, not {b}"
    return None


def identity_of(data: Any) -> list[Any]:
    """Which text is to be predicted: the file with its size and time, or a digest of the text."""
    if data.text is not None:
        return [hashlib.sha256(json.dumps(data.text).encode()).hexdigest()]
    path = Path(data.predict_file).expanduser()
    try:
        if data.predict_file == "-" or path.is_fifo():
            return ["-"]
        stat = path.stat()
    except OSError as error:
        raise ValueError(f"predict_file={data.predict_file!r} cannot be read: {error.strerror}") from error
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def fingerprint(module: nn.Module) -> str:
    """A digest of the weights, by a thousand numbers of each: trained on, they all change."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor):
            flat = value.detach().flatten()
            some = flat[:: max(1, len(flat) // 1024)].to("cpu", torch.float64)
            digest.update(f"{name} {tuple(value.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def num_lines(data: Any) -> int | None:
    """Lines of ``data.text`` or of the file ``data.predict_file``; None where they cannot be known beforehand."""
    if data.text is not None:
        return 1 if isinstance(data.text, str) else len(data.text)
    path = Path(data.predict_file).expanduser()
    if data.predict_file == "-" or not path.is_file():
        return None
    count, last = 0, b"\n"
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            count, last = count + piece.count(b"\n"), piece
    return count + (not last.endswith(b"\n"))


def watched(
    lines: Iterator[Line], total: int | None, shown: bool, start: int = 0, stream: TextIO | None = None
) -> Iterator[Line]:
    """The lines, with a note now and then of how many are done: each second on a terminal, else each minute.

    Args:
        lines: as they come.
        total: how many there are; None: it is not known.
        shown: whether anything is said.
        start: lines that were done before.
        stream: where it is said; None: stderr.
    """
    stream = sys.stderr if stream is None else stream
    terminal = shown and stream.isatty()
    every, begun = _TERMINAL if terminal else _LOG, time.monotonic()
    said, of = begun, "" if total is None else f" of {total:,}"
    for count, line in enumerate(lines, 1):
        yield line
        now = time.monotonic()
        if shown and now - said >= every:
            said = now
            note = f"{start + count:,}{of} lines, {count / (now - begun):.3g} a second"
            print(f"\r\x1b[K{note}" if terminal else note, end="" if terminal else "\n", file=stream, flush=True)
    if terminal and said > begun:
        print("\r\x1b[K", end="", file=stream, flush=True)
