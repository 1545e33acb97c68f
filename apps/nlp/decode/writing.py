"""``WritingModule``: what modules share whose model writes texts in validation, test and prediction."""

from __future__ import annotations

from typing import Any

from apps.nlp.decode.run import in_dtype
from apps.train.module import SparseModule, Stage


class WritingModule(SparseModule):
    """Base of modules that decode in another dtype: within a pass over the data their model is copied once."""

    model: Any
    # A list, so that the copy is no part of the module; None outside of a pass.
    _copies: list[Any] | None = None

    def model_in(self, dtype: str | None) -> Any:
        """Return the model in a dtype, one copy for a pass; outside of a pass, or for None, as it is."""
        if dtype is None or self._copies is None:
            return self.model
        if not self._copies:
            self._copies.append(in_dtype(self.model, dtype))
        return self._copies[0]

    def _start_pass(self, stage: Stage) -> None:
        super()._start_pass(stage)
        self._copies = []

    def on_validation_epoch_end(self) -> None:
        self._copies = None  # the weights move on
        super().on_validation_epoch_end()

    def on_test_epoch_end(self) -> None:
        self._copies = None
        super().on_test_epoch_end()

    def on_predict_epoch_start(self) -> None:
        self._copies = []

    def on_predict_epoch_end(self) -> None:
        self._copies = None
