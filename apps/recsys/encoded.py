"""Modules whose checkpoints say how their data are encoded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apps import sharded
from apps.training import SparseModule


class EncodedModule(SparseModule):
    """A module whose inputs are numbers that stand for values: its checkpoint says for which.

    Data with ``encoding_state`` and ``adopt`` encode by it, whatever their own rows would have taught.
    """

    _encoding: Mapping[str, Any] | None = None

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        module = super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        if sharded.is_sharded(checkpoint_path):  # its weights are put together without Lightning's hooks
            module._encoding = sharded.read_rest(Path(checkpoint_path)).get("encoding")
        return module

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._hand_over()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        state = getattr(self._data(), "encoding_state", self._encoding)
        if state is not None:
            checkpoint["encoding"] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._encoding = checkpoint.get("encoding")
        if self._data() is not None:
            self._hand_over()

    def _hand_over(self) -> None:
        """Tell the data, and refuse those that say otherwise of the columns or items than the model."""
        adopt = getattr(self._data(), "adopt", None)
        if adopt is not None and self._encoding is not None:
            adopt(self._encoding)
        self._check_data()

    def _check_data(self) -> None:
        self._check_data_arguments()
