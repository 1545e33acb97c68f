"""The folder of a run is one that a run has made; one training at a time uses it, and an earlier run is put aside."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from apps.base.files import delete, holding, naming, replacing
from apps.train.watch.logs import METRICS, read_rows

MARKER = ".moesaic-run"
"""This file marks the folder of a run. A training holds a lock on it."""

OF_USERS = "ModelCheckpoint"
"""The folder of the checkpoints that a user's own callbacks write, beside ``checkpoints``."""

_CURVES = ("events.out.tfevents.*", "hparams.yaml")
"""The files that TensorBoard's writer leaves."""


def is_unused(folder: Path) -> bool:
    """Return whether a folder is new or empty."""
    return not folder.is_dir() or not any(folder.iterdir())


def mark(folder: Path) -> None:
    """Mark a folder as a run's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


@contextlib.contextmanager
def marked_if_new(folder: Path) -> Iterator[None]:
    """Mark a new or empty folder as a run's, and delete it if an error in the block leaves no file in it."""
    is_new = is_unused(folder)
    if is_new:
        mark(folder)
    try:
        yield
    except BaseException:
        if is_new and [path.name for path in folder.iterdir()] == [MARKER]:
            delete(folder)
        raise


def is_own(checkpoint: Path, folder: Path) -> bool:
    """Return whether a checkpoint belongs to the run in a folder, and not to one that was put aside there."""
    path, folder = checkpoint.resolve(), folder.resolve()
    return path.is_relative_to(folder) and not path.is_relative_to(folder / "earlier")


def check_free(folder: Path) -> None:
    """Raise a ValueError if a folder for a training holds files and no run has made it."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    if files and not (folder / MARKER).exists():
        raise ValueError(
            f"{folder} holds {files[0].name}, and no run has made the folder: it stays as it is; give another --run_dir"
        )


def check_own(path: Path) -> None:
    """Raise a ValueError if a file that is to be replaced exists in a folder that does not belong to a run."""
    if path.exists() and not (path.parent / MARKER).exists():
        raise ValueError(f"{path} is no run's: it stays as it is; give another --run_dir")


def check_unlinked(folders: Iterable[Path]) -> None:
    """Raise a ValueError if one of the folders that a run writes to is a link, or holds one: it leads elsewhere.

    Files that the run replaces may be links, and those in the folders of other libraries may not: these follow them.
    The folder of the run and those above it are not looked at.
    """
    for path in (path for folder in folders for path in (folder, *folder.rglob("*"))):
        if path.is_symlink() and (path.is_dir() or path.parent.name in ("profile", "tensorboard")):
            raise ValueError(f"{path} leads to {path.resolve()}, and a run writes in its own folder: remove the link")


def put_aside(folder: Path, paths: Iterable[Path]) -> Path:
    """Move ``paths`` from ``folder``, in their order, to a new numbered subfolder of ``earlier``, and return that.

    The newest run has the highest number. A move that a kill interrupted is completed in its own subfolder.
    """
    paths = list(paths)
    number = max((int(p.name) for p in (folder / "earlier").glob("*") if p.name.isdecimal()), default=0)
    target = folder / "earlier" / str(number)
    if not number or any((target / path).exists() for path in (Path(MARKER), *(p.relative_to(folder) for p in paths))):
        target = target.with_name(str(number + 1))
    for path in paths:
        (target / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target / path.relative_to(folder))
    mark(target)
    return target


class RunFolder(Callback):
    """Prepares the folder of a run at the start of its training; until then an earlier run there stays whole.

    All files of an earlier run that has logged a step or left a checkpoint are moved to a numbered folder in
    ``earlier``. A run that resumes from its own checkpoint moves nothing. Files that no run writes are not touched.

    Args:
        folder: folder of the run.
        descriptions: texts to write there, by the name of the file.
        overwrite: remove the earlier run instead; runs in ``earlier`` stay.
    """

    # The log and the checkpoints are moved last: a kill half-way loses none. The curves have names of their own.
    names = ("config.yaml", "signatures.json", "test.json", "validate.json", "predictions.jsonl",
             "search.jsonl", "search.html", "sweep.json", "sweep.png", "report.html", "report.json", "report",
             "adapter", "profile", METRICS, OF_USERS, "checkpoints")  # fmt: skip

    def __init__(self, folder: Path, descriptions: Mapping[str, str], overwrite: bool = False) -> None:
        self.folder, self.descriptions, self.overwrite = folder, dict(descriptions), overwrite
        self._curves: list[Path] = []
        self._earlier: list[Path] = []
        self._started = False

    def _list_curves(self) -> list[Path]:
        return sorted(path for pattern in _CURVES for path in (self.folder / "tensorboard").glob(pattern))

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder for the training inside, or raise a ValueError if another training holds it."""
        new = not self.folder.exists()
        refusal = f"another training is running in {self.folder}: wait for its end, or give another --run_dir"
        with contextlib.ExitStack() as stack:
            with naming(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                if new:
                    stack.callback(self._remove_unused)
                stack.enter_context(holding(self.folder / MARKER, refusal))
            # TensorBoard starts this run's file before the training starts.
            self._curves = self._list_curves()
            self._earlier = [*self._curves, *(p for p in (self.folder / name for name in self.names) if p.exists())]
            yield

    def _remove_unused(self) -> None:
        """Remove the folder if no training has started in it."""
        if not self._started:
            with contextlib.suppress(OSError):  # it holds other files
                (self.folder / MARKER).unlink()
                self.folder.rmdir()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the files that TensorBoard has begun if a run ends before its training starts."""
        if self._started or not trainer.is_global_zero:
            return
        for path in self._list_curves():
            if path not in self._curves:
                path.unlink()
        curves = self.folder / "tensorboard"
        if curves.is_dir() and not any(curves.iterdir()):
            curves.rmdir()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A run that resumes from another folder writes here before its training starts, such as its kept epochs.
        if trainer.is_global_zero and trainer.ckpt_path and not is_own(Path(trainer.ckpt_path), self.folder):
            self._clear()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            # Lightning's finders restore a hidden checkpoint of the start.
            found = not trainer.global_step and Path(trainer.ckpt_path or "").name.startswith(".")
            if trainer.ckpt_path and not found:
                print(
                    f"going on from {trainer.ckpt_path}: step {trainer.global_step}, epoch {trainer.current_epoch + 1}"
                )
                # TensorBoard's writer leaves a file that is there as it is.
                (self.folder / "tensorboard" / "hparams.yaml").unlink(missing_ok=True)
            else:
                self._clear()
            for name, text in self.descriptions.items():
                with naming(self.folder / name), replacing(self.folder / name) as file:
                    file.write(text)
        self._started = True

    def _clear(self) -> None:
        """Put the run in the folder aside, or remove it."""
        has_checkpoint = any(path for name in (OF_USERS, "checkpoints") for path in (self.folder / name).glob("*.ckpt"))
        if not has_checkpoint and not any(int(row["step"]) for row in read_rows(self.folder / METRICS)):
            for path in self._curves:  # TensorBoard would draw them over this run's
                path.unlink()
        elif self.overwrite:
            for path in self._earlier:
                delete(path)
            what = ", ".join(path.relative_to(self.folder).as_posix() for path in self._earlier)
            print(f"--overwrite has removed the earlier run in {self.folder}: {what}")
        else:
            target = put_aside(self.folder, self._earlier)
            print(f"{self.folder} held an earlier run: it is in {target} now (--ckpt_path {target} tests it)")
