"""Gates conditioned on an example's domain, user and item (PEPNet), and the domain's part of the logits (STAR)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.kernels import cpu


class TwoLayers(nn.Module):
    """``W' relu(W x + b) + b'``, with W' and b' at 0: it starts as a network that puts out 0.

    Args:
        dim: width of the input.
        hidden_dim: width of the hidden layer.
        out_dim: width of the output.
    """

    def __init__(self, dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.first, self.last = cpu.Linear(dim, hidden_dim), cpu.Linear(hidden_dim, out_dim)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(F.relu(self.first(x)))
        return y


class EmbeddingGate(nn.Module):
    """EPNet (arXiv 2302.01115, eq. 5): ``E * 2 sigmoid(W' relu(W [v_d, sg(E)] + b) + b')`` scales the columns E of an
    example by its domain d. No gradient reaches E through the gate (sg), which starts at 1.

    Args:
        domain_dim: width of the domain's vector v_d.
        dim: width of E, the numbers and embeddings side by side.
        hidden_dim: width of the gate's hidden layer.
    """

    def __init__(self, domain_dim: int, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.layers = TwoLayers(domain_dim + dim, hidden_dim, dim)

    def forward(self, domain_BQ: Tensor, parts: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return ``parts``, each (B, width) or None, scaled."""
        given = [part for part in parts if part is not None]
        gate_BD = 2 * self.layers(torch.cat((domain_BQ, *(part.detach() for part in given)), dim=1)).sigmoid()
        scaled = iter(gate_BD.split([part.shape[1] for part in given], dim=1))
        return [None if part is None else part * next(scaled) for part in parts]


class TowerGates(nn.Module):
    """PPNet (arXiv 2302.01115, eq. 6-7): for each layer of the towers a gate ``2 sigmoid(W' relu(W p + b) + b')`` that
    scales the layer's input, task by task. All gates start at 1.

    Args:
        dim: width of p, which the gates read.
        hidden_dim: width of a gate's hidden layer.
        widths: widths of the inputs of the towers' layers, with the logit's layer last.
        num_tasks: t.
    """

    def __init__(self, dim: int, hidden_dim: int, widths: Sequence[int], num_tasks: int) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.layers = nn.ModuleList(TwoLayers(dim, hidden_dim, num_tasks * width) for width in widths)

    def forward(self, prior_BP: Tensor) -> list[Tensor]:
        """Return the gates (t, B, width) of the layers."""
        gates = [2 * layers(prior_BP).sigmoid() for layers in self.layers]
        return [gate.unflatten(1, (self.num_tasks, -1)).transpose(0, 1) for gate in gates]
