"""``SparseFFN`` replaces a feed-forward network of a dense model, and ``put_layer`` puts it there."""

from __future__ import annotations

from torch import Tensor, nn

from ...config import MoEConfig
from ...contract import RoutingContext
from ...layers import MoE
from ..read.feed_forward import FeedForwardPart


class SparseFFN(nn.Module):
    """An MoE layer in the place of a feed-forward network, called as that was: ``core.sparsify`` makes it.

    Its tensors are the tensors of ``moe``, under ``moe.`` in a ``state_dict``.

    Args:
        moe: the layer.
        part: the network that was there, of which sizes and places are kept, and no tensor.
        config: what ``moe`` was built from.
        start: how the experts were initialized.
        replaced: name of the class that was there.

    Attributes:
        layout, dim, out_dim: as in ``FeedForwardPart``.
        dropout: the network's own dropout behind the last linear layer.
        dense_params, dense_flops: parameters of the network, and its forward FLOPs per token.
    """

    def __init__(self, moe: MoE, part: FeedForwardPart, config: MoEConfig, start: str, replaced: str) -> None:
        super().__init__()
        self.moe, self.dropout = moe, nn.Dropout(part.output_dropout)
        self.layout, self.dim, self.out_dim = part.layout, part.dim, part.out_dim
        self.config, self.start, self.replaced = config, start, replaced
        self.dense_params, self.dense_flops = part.num_params(), part.flops_per_token()

    @property
    def weight(self) -> Tensor:
        """A tensor of the experts' dtype and device, for which models ask a linear layer: the first that there is."""
        experts = self.moe.experts
        tensors = (*experts.parameters(), *experts.buffers())
        return next(t for t in tensors if t.is_floating_point())

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Tensor:
        """Run the layer.

        Args:
            x: as ``layout`` says: (..., D) tokens, (S, B, D), or a map (B, D, H, W). A map, and an image of tokens
                (B, H, W, D), is one sequence of H * W tokens; (T, D) is one sequence too.
            context: for the router; the model that was made sparse gives none, so that padding is routed as any token.

        Returns:
            a tensor of x's layout, D_out wide.

        Raises:
            ValueError: as ``MoE.forward``.
        """
        if self.layout == "channels_first":
            y_BSD = self.moe(x.flatten(2).transpose(1, 2), context)
            y = y_BSD.transpose(1, 2).unflatten(2, x.shape[2:])
        elif self.layout == "sequence_first" and x.ndim == 3:
            y = self.moe(x.transpose(0, 1), context).transpose(0, 1)
        elif x.ndim > 3:
            y = self.moe(x.flatten(1, -2), context).unflatten(1, x.shape[1:-1])
        else:
            y = self.moe(x, context)
        dropped: Tensor = self.dropout(y)
        return dropped

    def extra_repr(self) -> str:
        return f"replaced={self.replaced}, start={self.start}, layout={self.layout}"


def put_layer(model: nn.Module, name: str, part: FeedForwardPart, layer: nn.Module) -> nn.Module:
    """Put a layer in the place of a feed-forward network, in place.

    Args:
        model: the model, or a copy of it.
        name: dotted name of the module that was read; "": the model itself.
        part: its description.
        layer: the layer that replaces the network.

    Returns:
        ``model``; ``layer`` if the model itself is the network.
    """
    module = model.get_submodule(name)
    for child in part.emptied:
        _set_child(module, child, nn.Identity())
    for attribute, value in part.settings.items():
        module._modules.pop(attribute, None)  # torch lets no function take a child's place
        setattr(module, attribute, value)
    place = ".".join(filter(None, (name, part.at)))
    if not place:
        return layer
    _set_child(model, place, layer)
    # Padding as nested tensors is only for torch's fused blocks.
    for m in model.modules():
        if isinstance(m, nn.TransformerEncoder) and any(isinstance(inner, SparseFFN) for inner in m.modules()):
            m.use_nested_tensor = False
    return model


def _set_child(model: nn.Module, name: str, child: nn.Module) -> None:
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, child)
