"""Experts in a star: each is the product of its own weights with the weights of a center that all share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .base import local_tensor
from .mlp import MLP, MLPExperts
from .products import floats, init_linear_


class StarExperts(MLPExperts):
    """E networks as ``MLPExperts``, with weights ``w_e * w`` and biases ``b_e + b``, with w and b of one center (STAR,
    arXiv 2101.11427, eq. 8). Weights and biases of norms are joined likewise.

    An expert's own weights start at 1 and its biases at 0, so that all experts start as the center, which starts as
    ``MLPExperts`` do.

    Parameters: as in ``MLPExperts`` for E experts, and ``centre``, which holds the same names without the axis of the
    experts.

    Args:
        num_experts: E.
        dim: D.
        config: the layers.
    """

    starts_alike = True

    def __init__(self, num_experts: int, dim: int, config: MLP) -> None:
        super().__init__(config, num_experts, dim)
        own = self.named_parameters(recurse=False)
        self.centre = nn.ParameterDict({name: nn.Parameter(torch.empty(p.shape[1:])) for name, p in own})
        self._start()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._start()

    def _start(self) -> None:
        """Initialize the center as one expert of ``MLPExperts``, and the experts' own parameters as the identity."""
        for name, parameter in self.named_parameters(recurse=False):
            nn.init.constant_(parameter, 1.0 if _is_factor(name) else 0.0)
        for name, parameter in self.centre.items():
            if name.startswith("w_"):
                init_linear_(parameter[None], self.centre.get(f"b_{name[2:]}"))
            elif name.startswith("norm"):
                nn.init.constant_(parameter, 1.0 if _is_factor(name) else 0.0)

    def no_weight_decay(self) -> set[str]:
        """Return the experts' own parameters, which do not decay: a factor would go to 0 where it starts at 1."""
        return {name for name, _ in self.named_parameters(recurse=False)}

    def _get(self, name: str, i: int) -> Any:
        own = super()._get(name, i)
        if f"{name}_{i}" not in self.centre:
            return own
        own = floats(own)
        centre = self.centre[f"{name}_{i}"]
        return own * centre if _is_factor(name) else own + centre

    def weights_of(self, e: int) -> dict[str, Tensor]:
        """Return the parameters and buffers of expert ``e`` only, without the center's, as views."""
        if not 0 <= e < self.num_local_experts:
            raise ValueError(f"expert {e} is not in range(num_local_experts={self.num_local_experts})")
        own = (*self.named_parameters(recurse=False), *self.named_buffers(recurse=False))
        return {name: local_tensor(t)[e] for name, t in own}

    def init_each(self, fn: Callable[[Tensor], Any]) -> None:
        """Start the center's matrices by ``fn`` and its biases at zero; the experts' own start where all are alike."""
        self.reset_parameters()
        with torch.no_grad():
            for name, parameter in self.centre.items():
                if name.startswith("w_"):
                    fn(parameter)
                elif name.startswith("b_"):
                    parameter.zero_()


def _is_factor(name: str) -> bool:
    """Return whether a parameter multiplies the center's; biases are added to it."""
    return name.startswith(("w", "norm_weight"))
