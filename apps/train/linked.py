"""A module that its checkpoint alone can make again: its constructor's arguments, and what it knows of its data."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from lightning.pytorch import LightningModule

from apps.train import sharded
from core.config.plain import arguments_from_plain, arguments_to_plain


class LinkedModule(LightningModule):
    """A LightningModule that keeps its arguments and its data's encoding in the checkpoint.

    Arguments are kept as plain values, or a checkpoint could not be loaded with ``weights_only``. Data that have
    ``encoding_state`` (what their numbers stand for) and ``adopt`` are given the state that the checkpoint keeps.
    """

    data_arguments: ClassVar[tuple[str, ...]] = ()
    """Constructor parameters that the command line fills with the data module's attribute of the same name."""

    starts_afresh: bool = True
    """The weights are still those it was made with. Who is to load a checkpoint says so by False."""

    _encoding: Mapping[str, Any] | None = None
    """What the numbers of the data stand for, as the checkpoint says; None: no checkpoint says it."""

    def __init__(self) -> None:
        super().__init__()
        # Lightning gathers the arguments of the subclasses' constructors from here.
        self.save_hyperparameters(logger=False)
        taken = inspect.signature(type(self).__init__).parameters
        every = any(p.kind is p.VAR_KEYWORD for p in taken.values())
        # Without those of a base class's constructor alone, which the subclass could not be made anew with.
        self._arguments = {k: v for k, v in self.hparams.items() if every or k in taken}
        plain = arguments_to_plain(type(self), self._arguments)
        self.hparams.clear()
        self._set_hparams(plain)
        self._hparams_initial = dict(plain)

    def twin(self, **changed: Any) -> Self:
        """Return the module anew, untrained, with other values of the arguments in ``changed``."""
        return type(self)(**{**self._arguments, **changed})

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.starts_afresh = False
        return super().load_state_dict(*args, **kwargs)

    # ---- the data

    def _data(self) -> Any:
        """Return the trainer's data module; None without one."""
        return None if self._trainer is None else getattr(self._trainer, "datamodule", None)

    @property
    def encoding_state(self) -> Mapping[str, Any] | None:
        """What the numbers of the data stand for: as the data say, else as the checkpoint does; None: neither does."""
        own: Mapping[str, Any] | None = getattr(self._data(), "encoding_state", None)
        return self._encoding if own is None else own

    def setup(self, stage: str) -> None:
        self._link()

    def _link(self) -> None:
        """Give the data the encoding that the checkpoint keeps, and refuse data that do not fit the model."""
        adopt = getattr(self._data(), "adopt", None)
        if adopt is not None and self._encoding is not None:
            adopt(self._encoding)
        self._check_data()

    def _check_data(self) -> None:
        """Refuse data that say otherwise of ``data_arguments`` than the model's attributes of these names.

        Raises:
            ValueError: naming both values.
        """
        for name in self.data_arguments:
            given = getattr(self._data(), name, None)
            if given is not None and given != getattr(self, name):
                raise ValueError(f"model.{name}={getattr(self, name)} does not fit the data, whose {name} is {given}")

    # ---- the checkpoint

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["module_class"] = f"{type(self).__module__}.{type(self).__qualname__}"
        if self.encoding_state is not None:
            checkpoint["encoding"] = self.encoding_state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._encoding = checkpoint.get("encoding")
        if self._data() is not None:
            self._link()

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the module of a checkpoint, with the weights that a test uses; ``kwargs`` beat what it remembers.

        Raises:
            ValueError: the checkpoint names a class that is not registered.
        """
        shards = sharded.read(checkpoint_path) if sharded.is_sharded(checkpoint_path) else None
        checkpoint = shards or torch.load(checkpoint_path, map_location="cpu", weights_only=True)
        hparams = checkpoint.get("hyper_parameters", {})
        if "_instantiator" in hparams:  # Lightning would import what it names
            raise ValueError(f"{checkpoint_path} names a function to be made with, which no checkpoint of ours does")
        remembered = arguments_from_plain(cls, hparams, f"{checkpoint_path}: model")
        if shards is not None:
            module = cls(*args, **{**remembered, **kwargs})
            module.load_state_dict(shards["state_dict"])
            module._encoding = shards.get("encoding")  # Lightning's hooks are not called here
            return module
        return super().load_from_checkpoint(checkpoint_path, *args, **{"weights_only": True, **remembered, **kwargs})
