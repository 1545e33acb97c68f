"""The base of the apps' data modules: options, loaders, the encoding and its checkpoint, one line of description."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader

from apps.base.checks import check_at_least
from apps.data.cache import cache_root
from apps.data.loader import ResumableLoader, as_it_is, in_order
from apps.data.splits import SPLITS, Split

L = TypeVar("L", bound=DataLoader[Any])


class SuiteData(LightningDataModule):
    """Data from their files to the batches of every stage.

    A subclass brings ``read`` and ``examples``; ``batching`` and ``eval_loader`` if a batch is not a number of
    examples in their order; ``encoding``, ``encoding_of`` and ``forget`` if it learns an encoding of its values.

    Lightning asks a data module for its loaders. The suite asks for more, all of which your own may leave out:

    - attributes that a model names in ``data_arguments``, such as ``num_classes``: they become arguments of the model;
    - ``encoding_state`` and ``adopt``: a checkpoint keeps the one and hands it to the other before the model is made,
      so that other files are read in the way of the training files;
    - ``extend``, instead of ``adopt`` when a training starts from a checkpoint's weights: values that the checkpoint
      lacks get numbers of their own (see ``LinkedModule.widened``);
    - ``from_checkpoint`` and ``superseded``, described below;
    - ``defaults_of_none(arguments)``: the default configs of arguments that are None;
    - ``train_eval_dataloader``: the training examples in their order, without random transforms, for reports and for
    models other than networks.

    Args:
        dataset: a name of ``moesaic data list``, or one for the user's own files.
        root: folder with the user's own copy of the files; nothing is downloaded then.
        cache_dir: folder for downloads and encoded data; None: ~/.cache/moesaic.
        batch_size: training examples per step and process; None if ``batching`` decides.
        eval_batch_size: examples per step and process in evaluation.
        drop_last: leave out the last training batch of an epoch if it is not full.
        num_workers: processes that make batches.
        seed: seed of the order of training and of random transforms; None: the run's.

    Raises:
        ValueError: a value out of its range.
    """

    unit: ClassVar[str] = "examples"
    """Name of the examples in messages."""
    hold_out: ClassVar[str]
    """Hint how a split gets examples, for the message when it has none; ``{split}`` stands for its name."""
    from_checkpoint: ClassVar[tuple[str, ...]] = ()
    """Arguments that the command line takes from a checkpoint where they are not given."""
    places: ClassVar[tuple[str, ...]] = ()
    """Those of them that name a folder: a run keeps its absolute path, and a flag says where it is now."""
    superseded: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Arguments without effect where another one is given."""

    def __init__(
        self,
        dataset: str,
        root: str | None = None,
        cache_dir: str | None = None,
        *,
        batch_size: int | None = None,
        eval_batch_size: int | None = None,
        drop_last: bool = False,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, batch_size=batch_size, eval_batch_size=eval_batch_size)
        check_at_least(0, num_workers=num_workers)
        self.dataset, self.root, self.cache_dir = dataset, root, cache_dir
        self.batch_size, self.eval_batch_size, self.drop_last = batch_size, eval_batch_size, drop_last
        self.num_workers, self.seed = num_workers, seed
        self._adopted: Any = None
        self._extended: Any = None
        self._opened: Any = None
        self._described = False

    # ---- the parts that a subclass brings

    def read(self) -> Any:
        """Fetch, encode and open the files; ``opened`` keeps its result.

        Raises:
            ValueError: a file is missing or malformed.
        """
        raise NotImplementedError

    def examples(self, split: Split) -> Any:
        """Return the examples of a split, a map-style dataset; it is empty, or None, without examples."""
        raise NotImplementedError

    def check(self, stage: str | None) -> None:
        """Raise a ``ValueError`` for data that do not serve one of Lightning's stages."""

    def warnings(self) -> list[str]:
        """Return lines on what may make a training on these data worthless, such as a feature that is the label."""
        return []

    def sizes(self) -> dict[Split, int]:
        """Return the size of each split, in ``unit``."""
        return {split: len(self.examples(split)) for split in SPLITS}

    def batching(self, examples: Any) -> dict[str, Any]:
        """Return the arguments of ``ResumableLoader`` that make training batches of examples.

        By default the examples make their batches themselves, and use no random numbers.
        """
        return {"batch_size": self.batch_size, "drop_last": self.drop_last, "collate_fn": as_it_is, "draws": False}

    def eval_loader(self, examples: Any) -> DataLoader[Any]:
        """Return the loader that evaluates examples."""
        assert self.eval_batch_size is not None
        return in_order(examples, self.eval_batch_size, self.num_workers)

    @property
    def needs_no_dataset(self) -> bool:
        """True if the user gives all that is predicted, and its encoding is known: nothing is fetched then."""
        return False

    # ---- the files and their encoding

    @property
    def cache(self) -> Path:
        """The folder of downloads and encoded data."""
        return cache_root(self.cache_dir)

    @property
    def opened(self) -> Any:
        """The result of ``read``, which runs when it is first asked for."""
        if self._opened is None:
            self._opened = self.read()
        return self._opened

    def forget(self) -> None:
        """Drop the result of ``read``, so that the files are read again, by another encoding."""
        self._opened = None

    @property
    def encoding(self) -> Any:
        """The meaning of the values to a model, such as the words of a table's rows; None: they are plain."""
        return None

    @classmethod
    def encoding_of(cls, state: Mapping[str, Any]) -> Any:
        """Return the encoding whose ``encoding_state`` this is.

        Raises:
            ValueError: it does not belong to such data.
        """
        raise ValueError(f"the checkpoint keeps an encoding ({', '.join(state)}), and {cls.__name__} has none")

    @property
    def encoding_state(self) -> dict[str, Any] | None:
        """The ``encoding`` as plain values and tensors, for a checkpoint; None if there is none."""
        return None if self.encoding is None else self.encoding.state()

    def adopt(self, encoding_state: Mapping[str, Any]) -> None:
        """Use the encoding that a checkpoint keeps, instead of one that would be learned from these data.

        Raises:
            ValueError: it does not encode such data, or contradicts an option that was given.
        """
        encoding = self.encoding_of(encoding_state)
        if encoding == self._adopted:
            return
        if self._opened is not None and encoding != self.encoding:
            self.forget()
        self._adopted = encoding

    def extend(self, encoding_state: Mapping[str, Any]) -> None:
        """Use the encoding that a checkpoint keeps, and add the training examples' new values.

        A subclass whose encoding can be extended calls ``_extend``; others ``adopt`` it as it is.

        Raises:
            ValueError: as for ``adopt``.
        """
        self.adopt(encoding_state)

    def _extend(self, encoding_state: Mapping[str, Any]) -> None:
        self.forget()
        self._extended = self.encoding_of(encoding_state)

    @property
    def digest_of_given(self) -> str | None:
        """The key that tells files with a checkpoint's encoding from others; None: there is none."""
        if self._adopted is not None:
            return str(self._adopted.digest)
        return None if self._extended is None else f"{self._extended.digest}, extended"

    def _adopt_of_model(self) -> None:
        """Adopt the encoding of the model's checkpoint. Lightning would set the model up after the data."""
        module = None if self.trainer is None else self.trainer.lightning_module
        if (state := getattr(module, "_encoding", None)) is not None:
            self.adopt(state)

    # ---- the description

    @property
    def title(self) -> str:
        """Name of the data in the description."""
        return self.dataset

    def describe(self) -> str:
        """Return one line that describes the data and the size of each split."""
        counts = ", ".join(f"{size:,} {split}" for split, size in self.sizes().items())
        return f"{self.title}: {counts} {self.unit}"

    def announce(self) -> None:
        """Log the description before a run."""
        logging.getLogger(type(self).__module__).info("%s", self.describe())

    # ---- Lightning

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Return the batch that a model reads, of one that travels smaller, such as images as uint8."""
        return batch.finished() if hasattr(batch, "finished") else batch

    def prepare_data(self) -> None:
        self._adopt_of_model()
        if not self.needs_no_dataset:
            _ = self.opened

    def setup(self, stage: str | None = None) -> None:
        self._adopt_of_model()
        if stage != "predict" or not self.needs_no_dataset:
            _ = self.opened
        self.check(stage)
        if stage != "predict" and not self._described and rank_zero_only.rank == 0:
            self._described = True
            self.announce()

    def train_dataloader(self) -> ResumableLoader:
        self.check("fit")
        examples = self.examples("train")
        loader = ResumableLoader(
            examples,
            seed=self.seed,
            # With overfit_batches Lightning repeats the same few batches each epoch.
            shuffle=not getattr(self.trainer, "overfit_batches", 0),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            **self.batching(examples),
        )
        return self._pinned(loader)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return the validation batches; an empty list if training has none to look at."""
        validates = self.trainer is not None and self.trainer.state.fn == TrainerFn.VALIDATING
        return self._loader_of("val", needed=validates)

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self._loader_of("test", needed=True)

    def predict_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return the batches to predict, by default the test batches."""
        return self.test_dataloader()

    def _loader_of(self, split: Split, needed: bool) -> DataLoader[Any] | list[Any]:
        examples = self.examples(split)
        if examples is not None and len(examples):
            return self._pinned(self.eval_loader(examples))
        if needed:
            raise ValueError(f"{self.dataset} has no {split} {self.unit}: {self.hold_out.format(split=split)}")
        return []

    def _pinned(self, loader: L) -> L:
        """Return ``loader``; for a GPU its batches are in pinned memory, so that the host does not wait for a copy."""
        strategy = getattr(self.trainer, "strategy", None)
        loader.pin_memory = strategy is not None and strategy.root_device.type == "cuda"
        return loader
