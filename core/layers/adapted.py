"""``AdaptedLinear``: a frozen linear layer with a mixture of adapters."""

from __future__ import annotations

from torch import Tensor, nn

from ..contract import RoutingContext
from .moe import MoE


class AdaptedLinear(nn.Module):
    """A frozen linear layer and a mixture of adapters: ``base(x) + updates(x)``, or ``updates(base(x))``.

    Its ``state_dict`` has the base's tensors under ``base.``, the others under ``updates.``.
    ``core.add_adapters`` makes it.

    Args:
        base: the layer, whose parameters are frozen here.
        updates: a layer of ``MoEConfig.build(in_features, out_features)``, such as one of ``LoRA``; of
            ``build(out_features)`` if it comes after the base.
        after: whether the updates take the base's output, as ``IA3`` does.

    Raises:
        ValueError: ``base`` is not an ``nn.Linear``, or the updates have other widths.
    """

    def __init__(self, base: nn.Linear, updates: MoE, after: bool = False) -> None:
        super().__init__()
        if not isinstance(base, nn.Linear):
            raise ValueError(f"base is a {type(base).__name__}: adapters belong to an nn.Linear")
        taken = base.out_features if after else base.in_features
        for side, width, wanted in (("dim", updates.dim, taken), ("out_dim", updates.out_dim, base.out_features)):
            if width is not None and width != wanted:
                shape = f"in_features={base.in_features}, out_features={base.out_features}"
                raise ValueError(f"adapters of {side}={width} do not fit a base of {shape}: they need {side}={wanted}")
        self.base, self.updates, self.after = base.requires_grad_(False), updates, after

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Tensor:
        """Return (..., S, D) tokens after the layer, (..., S, D_out).

        Args:
            x: tokens, at least two dimensions.
            context: for routers that ask for one; a model that calls a linear layer gives none.

        Raises:
            ValueError: as ``MoE.forward``.
        """
        y: Tensor = self.base(x)
        if self.after:
            updated: Tensor = self.updates(y, context)
            return updated
        return y + self.updates(x, context)

    def extra_repr(self) -> str:
        return f"after={self.after}"
