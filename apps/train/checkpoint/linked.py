"""A module that can be rebuilt from its checkpoint only: its constructor's arguments, and its knowledge of its data."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from lightning.pytorch import Callback, LightningModule

from apps.base.messages import one_line
from apps.registry import name_of
from apps.train.checkpoint.contents import read_checkpoint, unlike, unlike_in_size
from apps.train.lightning_internals import set_initial_hparams, trainer_of
from core.config.plain import arguments_from_plain, arguments_to_plain
from core.offload import loading_experts

_logger = logging.getLogger(__name__)


class LinkedModule(LightningModule):
    """A LightningModule that keeps its arguments and its data's encoding in the checkpoint.

    When a trainer starts, arguments of ``data_arguments`` that were not given are taken from its data module. Arguments
    are kept as plain values, or a checkpoint could not be loaded with ``weights_only``. Data that have
    ``encoding_state`` (the meaning of their numbers) and ``adopt`` are given the state that the checkpoint keeps.
    """

    data_arguments: ClassVar[tuple[str, ...]] = ()
    """Constructor parameters that the command line fills with the data module's attribute of the same name."""

    starts_afresh: bool = True
    """The weights are still those it was made with. Who is to load a checkpoint says so by False."""

    loaded_from: Path | None = None
    """The checkpoint that the module was made from; None: it was made from none."""

    predict: Callable[..., Any]
    """Answers what a user has, such as image files; each app's model has its own."""

    _given: dict[str, Any]
    """Arguments that the constructor was given, by name."""

    _lacks: str | None = None
    """Arguments without which there is no network yet; None: it is there."""

    _encoding: Mapping[str, Any] | None = None
    """Encoding of the data that the checkpoint keeps; None where it keeps none."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        module = super().__new__(cls)
        names = [*inspect.signature(cls.__init__).parameters][1:]
        vars(module)["_given"] = dict(zip(names, args, strict=False)) | kwargs
        return module

    def __init__(self) -> None:
        super().__init__()
        # Lightning gathers the arguments of the subclasses' constructors from here.
        self.save_hyperparameters(logger=False)
        taken = inspect.signature(type(self).__init__).parameters
        every = any(p.kind is p.VAR_KEYWORD for p in taken.values())
        # Without arguments that only a base class's constructor has, which cannot rebuild the subclass.
        self._arguments: dict[str, Any] = {}
        self.keep_arguments({k: v for k, v in self.hparams.items() if every or k in taken})

    def keep_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Keep these values for the checkpoint, whatever the constructor was given."""
        self._arguments = {**self._arguments, **arguments}
        plain = arguments_to_plain(type(self), self._arguments)
        self.hparams.clear()
        self.hparams.update(plain)
        set_initial_hparams(self, plain, logs=False)

    def twin(self, **changed: Any) -> Self:
        """Return a new, untrained copy of the module, with other values of the arguments in ``changed``."""
        without = [name for name in ("grow", "distil") if name in self._arguments]  # a twin has other layers
        arguments: dict[str, Any] = {**self._arguments, **dict.fromkeys(without), **changed}
        return type(self)(**arguments)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        self.starts_afresh = False
        if assign:
            return super().load_state_dict(state_dict, strict, assign)
        with loading_experts(self, state_dict) as rest:
            return super().load_state_dict(rest, strict)

    # ---- the data

    def _data(self) -> Any:
        """Return the trainer's data module; None without one."""
        return getattr(trainer_of(self), "datamodule", None)

    @property
    def encoding_state(self) -> Mapping[str, Any] | None:
        """Return the encoding of the data, or else the one in the checkpoint; None if neither has any."""
        own: Mapping[str, Any] | None = getattr(self._data(), "encoding_state", None)
        return self._encoding if own is None else own

    def known_encoding(self, kind: Any, of: str, data: str) -> Any:
        """Return the encoding as an object: the checkpoint's, else the training data's.

        Args:
            kind: its class, which has ``from_state``.
            of: meaning of the encoding, for the message.
            data: class of the data that have one, likewise.

        Raises:
            ValueError: there is neither.
        """
        if self.encoding_state is None:
            raise ValueError(
                f"this model does not know {of}: load a checkpoint of a training with {data}, which keeps them"
            )
        return kind.from_state(self.encoding_state)

    def wait_for_data(self, lacks: str) -> None:
        """Leave the rest of the constructor to the time when a trainer brings data; ``lacks`` names arguments."""
        self._lacks = lacks
        self.register_forward_pre_hook(lambda module, _: module.check_whole())

    def check_whole(self) -> None:
        """Raise a ``ValueError`` if the module has no network, since it lacks arguments."""
        if self._lacks is not None:
            raise ValueError(
                f"{type(self).__name__} lacks {self._lacks}, which the data know: give them, or fit with a datamodule"
            )

    def configure_callbacks(self) -> list[Callback]:
        # Lightning asks for these first, before a callback or a strategy sees the networks.
        unknown = [name for name in self.data_arguments if self._given.get(name) is None] if self.starts_afresh else []
        found = {name: getattr(self._data(), name, None) for name in unknown}
        found = {name: value for name, value in found.items() if value is not None}
        if any(value != getattr(self, name, None) for name, value in found.items()):
            self._make_again(found)
        self._given |= found  # other data later do not change it
        self.check_whole()
        return []

    def _make_again(self, found: Mapping[str, Any]) -> None:
        """Call the constructor once more, with arguments that the data have."""
        trainer: Any = trainer_of(self)
        self._lacks = None
        self.__init__(**{**self._given, **found})  # type: ignore[misc]
        self.trainer = trainer
        _logger.info("%s takes from the data: %s", type(self).__name__, ", ".join(found))

    def setup(self, stage: str) -> None:
        self._link()

    def _link(self) -> None:
        """Give the data the encoding that the checkpoint keeps, and raise an error if the data do not fit the model."""
        adopt = getattr(self._data(), "adopt", None)
        if adopt is not None and self._encoding is not None:
            adopt(self._encoding)
        self._check_data()

    def _check_data(self) -> None:
        """Raise an error if the data's values of ``data_arguments`` differ from the model's attributes of these names.

        Raises:
            ValueError: naming both values.
        """
        for name in self.data_arguments:
            given = getattr(self._data(), name, None)
            if given is not None and given != getattr(self, name):
                raise ValueError(f"model.{name}={getattr(self, name)} does not fit the data, whose {name} is {given}")

    # ---- the checkpoint

    def widened(self, checkpoint: Mapping[str, Any], encoding_state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a checkpoint with the rows that this model has for values which the checkpoint's data lacked.

        By default it is as it was: a model whose tensors grow with the encoding of its data adds them.

        Args:
            checkpoint: contents of a checkpoint of such a model.
            encoding_state: encoding of this model's data, which extends the checkpoint's.

        Raises:
            ValueError: a tensor that cannot be extended.
        """
        return checkpoint

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["module_class"] = name_of(type(self))
        if self.encoding_state is not None:
            checkpoint["encoding"] = self.encoding_state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.adopt_encoding(checkpoint)

    def adopt_encoding(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the encoding of a checkpoint's data, and give it to the trainer's data, if there are any.

        Raises:
            ValueError: the data do not fit the model.
        """
        self._encoding = checkpoint.get("encoding")
        if self._data() is not None:
            self._link()

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, map_location: Any = "cpu", **changed: Any) -> Self:  # type: ignore[override]
        """Return the module of a checkpoint, with the weights that a test uses.

        Args:
            checkpoint_path: a file, or the folder of a sharded checkpoint.
            map_location: the device for the weights.
            changed: arguments of the constructor that override the checkpoint's.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is damaged, names a class that is not registered, or has other tensors than the model.
        """
        checkpoint = read_checkpoint(checkpoint_path)
        return cls.restored(checkpoint, str(checkpoint_path), **changed).to(map_location)

    @classmethod
    def restored(cls, checkpoint: dict[str, Any], path: str, **changed: Any) -> Self:
        """Return the module of a checkpoint's contents; see ``load_from_checkpoint``.

        Args:
            checkpoint: the contents.
            path: the file, for messages.
            changed: arguments of the constructor that override the checkpoint's.

        Raises:
            ValueError: as ``load_from_checkpoint``, or arguments or an encoding of which no such module can be made.
        """
        arguments = arguments_from_plain(cls, checkpoint.get("hyper_parameters") or {}, f"{path}: model")

        def made() -> Any:
            module = cls(**{**arguments, **changed})
            module.on_load_checkpoint(checkpoint)
            return module

        state = checkpoint["state_dict"]
        try:
            problem = unlike_in_size(state, made) or unlike(state, module := made())
        except (TypeError, LookupError, AttributeError, ArithmeticError) as error:
            what = one_line(f"{type(error).__name__}: {error}")
            raise ValueError(
                f"{path} makes no {cls.__name__}, so it is damaged or of another version: {what}"
            ) from error
        if problem:
            raise ValueError(f"{path} does not fit a {cls.__name__} of its arguments: {problem}")
        module.load_state_dict(state)
        module.loaded_from = Path(path)
        return module
