"""The folder of a run is one that a run has made; one training at a time uses it, and an earlier run is put aside."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from apps.base.files import delete, holding, naming, replacing

MARKER = ".moesaic-run"
"""This file marks the folder of a run. A training holds a lock on it."""

_CURVES = ("events.out.tfevents.*", "hparams.yaml")
"""The files that TensorBoard's writer leaves."""


def is_unused(folder: Path) -> bool:
    """Return whether a folder is new or empty."""
    return not folder.is_dir() or not any(folder.iterdir())


def mark(folder: Path) -> None:
    """Mark a folder as a run's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


def check_free(folder: Path) -> None:
    """Raise a ValueError where a folder for a training holds files and no run has made it."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    if files and not (folder / MARKER).exists():
        raise ValueError(
            f"{folder} holds {files[0].name}, and no run has made the folder: it stays as it is; give another --run_dir"
        )


def check_own(path: Path) -> None:
    """Raise a ValueError where a file that is to be replaced exists in a folder that is no run's."""
    if path.exists() and not (path.parent / MARKER).exists():
        raise ValueError(f"{path} is no run's: it stays as it is; give another --run_dir")


def check_unlinked(folders: Iterable[Path]) -> None:
    """Raise a ValueError where one of the folders that a run writes to is a link, or holds one: it leads elsewhere.

    Files that the run replaces may be links, and those in the folders of other libraries may not: these follow them.
    The folder of the run and those above it are not looked at.
    """
    for path in (path for folder in folders for path in (folder, *folder.rglob("*"))):
        if path.is_symlink() and (path.is_dir() or path.parent.name in ("profile", "tensorboard")):
            raise ValueError(f"{path} leads to {path.resolve()}, and a run writes in its own folder: remove the link")


def put_aside(folder: Path, paths: Iterable[Path], names: Iterable[str]) -> Path:
    """Move ``paths`` from ``folder`` into its subfolder ``earlier``, and return that.

    Before that, the files and folders ``names`` of ``earlier`` are deleted, which an earlier run has left there.
    """
    earlier = folder / "earlier"
    for name in names:
        delete(earlier / name)
    for path in paths:
        target = earlier / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    return earlier


class RunFolder(Callback):
    """Prepares the folder of a run at the start of its training; until then an earlier run there stays whole.

    All files of that run are moved to ``earlier``, where one run is kept, if it has left a checkpoint. A resumed run
    moves nothing. Files that no run writes are not touched.

    Args:
        folder: folder of the run.
        descriptions: texts to write there, by the name of the file.
    """

    # The checkpoints are moved last, at once: a kill half-way loses none. The curves have names of their own.
    names = ("metrics.csv", "config.yaml", "signatures.json", "test.json", "validate.json", "predictions.jsonl",
             "search.jsonl", "search.html", "sweep.json", "sweep.png",
             "report.html", "report.json", "report", "checkpoints")  # fmt: skip

    def __init__(self, folder: Path, descriptions: Mapping[str, str]) -> None:
        self.folder, self.descriptions = folder, dict(descriptions)
        # TensorBoard begins this run's file before the training starts.
        self._curves = self._list_curves()
        self._earlier = [*self._curves, *(p for p in (folder / name for name in self.names) if p.exists())]
        self._started = False

    def _list_curves(self) -> list[Path]:
        return sorted(path for pattern in _CURVES for path in (self.folder / "tensorboard").glob(pattern))

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder for the training inside, or raise a ValueError where another training holds it."""
        new = not self.folder.exists()
        refusal = f"another training is running in {self.folder}: wait for its end, or give another --run_dir"
        with contextlib.ExitStack() as stack:
            with naming(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                if new:
                    stack.callback(self._remove_unused)
                stack.enter_context(holding(self.folder / MARKER, refusal))
            yield

    def _remove_unused(self) -> None:
        """Remove the folder where no training has started in it."""
        if not self._started:
            with contextlib.suppress(OSError):  # it holds other files
                (self.folder / MARKER).unlink()
                self.folder.rmdir()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the files that TensorBoard has begun where a run ends before its training starts."""
        if self._started or not trainer.is_global_zero:
            return
        for path in self._list_curves():
            if path not in self._curves:
                path.unlink()
        curves = self.folder / "tensorboard"
        if curves.is_dir() and not any(curves.iterdir()):
            curves.rmdir()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            if trainer.ckpt_path:
                print(
                    f"going on from {trainer.ckpt_path}: step {trainer.global_step}, epoch {trainer.current_epoch + 1}"
                )
            else:
                self._put_aside()
            for name, text in self.descriptions.items():
                with naming(self.folder / name), replacing(self.folder / name) as file:
                    file.write(text)
        self._started = True

    def _put_aside(self) -> None:
        if any((self.folder / "checkpoints").glob("*.ckpt")):
            curves = (f"tensorboard/{path.name}" for path in (self.folder / "earlier" / "tensorboard").glob("*"))
            own = [name for name in curves if any(Path(name).match(pattern) for pattern in _CURVES)]
            earlier = put_aside(self.folder, self._earlier, [*own, *self.names, MARKER])
            (earlier / MARKER).touch()
            print(
                f"{self.folder} held an earlier run: it is in {earlier} now, where one earlier run is kept "
                f"(--ckpt_path {earlier / 'checkpoints' / 'last.ckpt'} goes on from it)"
            )
            return
        for path in self._curves:  # TensorBoard would draw them over this run's
            path.unlink()
