"""The dispatchers' base."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ..contract import Rows


class Dispatcher:
    """A dispatcher moves tokens to experts and back. It has no parameters, and a layer may be given another one.

    A layer is copied and pickled with its dispatcher: one that holds a process group leaves it out of its
    ``__getstate__``.

    Attributes:
        backend: kernels that sort and sum; a layer sets it (``MoELayer.backend``).
    """

    backend: str = "auto"
    travels: ClassVar[bool] = False
    """Whether rows are on their way for a while after ``dispatch`` has returned: shared experts compute meanwhile."""

    def dispatch(self, x: Tensor, routing: Any) -> Rows:
        """Return rows sorted by the experts that are here, with the weight of each: the weights travel with the rows.

        Args:
            x: (T, D) tokens, or the (B, S, D) that soft slots take.
            routing: the decision of the layer's router.
        """
        raise NotImplementedError

    def combine(self, rows: Rows) -> Tensor:
        """Return the experts' output as (T, D_out): weighted and summed here where it is not yet."""
        raise NotImplementedError
