"""Muon (arXiv 2502.16982): momentum made orthogonal, for the matrices inside a network; AdamW for the other groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from apps.train.torch_internals import has_amx
from core.parallel import local_part, part_of, whole_of

# X <- a X + b (X X^T) X + c (X X^T)^2 X drives singular values in (0, 1] between 0.7 and 1.2 in few steps.
_A, _B, _C = 3.4445, -4.775, 2.0315


def orthogonalized(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return about the nearest semi-orthogonal matrices, U V^T of each U S V^T, by Newton-Schulz iterations.

    Args:
        matrices: (..., m, n), such as the stacked matrices of experts.
        steps: number of iterations.

    Returns:
        (..., m, n) in bfloat16; in float32 on a CPU without AMX, where it is faster; in float64 if ``matrices`` are. A
        matrix of zeros stays zero.
    """
    x = matrices.reshape(-1, *matrices.shape[-2:]).to(_precision_of(matrices))
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT.contiguous()
    # The Frobenius norm bounds the largest singular value.
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return (x if wide else x.mT).reshape(matrices.shape)


def _precision_of(matrices: Tensor) -> torch.dtype:
    if matrices.dtype == torch.float64:
        return torch.float64
    on_plain_cpu = matrices.device.type == "cpu" and not has_amx()
    return torch.float32 if on_plain_cpu else torch.bfloat16


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose groups with ``"muon": True`` are updated by the orthogonalized momentum of their matrices.

    A matrix W (m, n), or each of a stack (E, m, n), or a convolution's weight (m, c, h, w) as (m, c h w) in a group
    with ``"flattened": True``, moves by ``-lr * 0.2 sqrt(max(m, n)) * orthogonalized(update)``,
    whose root mean square is about the same as an AdamW step's (arXiv 2502.16982, equation 4): both kinds of groups
    share one learning rate. Weight decay is decoupled.

    If a stack is sharded over processes, each updates its own matrices. Matrices that are sharded themselves are
    gathered first, and every process computes all of them.

    Args:
        params: groups, each with "muon" or without.
        momentum: decay of the gradients' running mean, with Nesterov's look-ahead.
        options: options of ``torch.optim.AdamW``.

    Raises:
        ValueError: a parameter of a "muon" group has fewer than two dimensions.
    """

    def __init__(self, params: Any, momentum: float = 0.95, **options: Any) -> None:
        super().__init__(params, **options)
        self.defaults["momentum"] = momentum
        for group in self.param_groups:
            group.setdefault("muon", False)
            group.setdefault("flattened", False)
            group.setdefault("momentum", momentum)
            for p in group["params"]:
                if group["muon"] and p.ndim < 2:
                    raise ValueError(f"Muon is for matrices: a parameter of shape {tuple(p.shape)} is none")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step of every group."""
        loss = super().step(closure)  # AdamW's groups
        for group in self.param_groups:
            if group["muon"]:
                self._muon_step(group)
        return loss

    def _init_group(self, group: dict[str, Any], *lists: Any) -> Any:
        # AdamW's step gathers a group's parameters here; parameters of Muon's groups are hidden from it.
        return super()._init_group({**group, "params": []} if group["muon"] else group, *lists)

    def _muon_step(self, group: dict[str, Any]) -> None:
        alike: dict[tuple[Any, ...], list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is not None:
                shape = (len(p), p[0].numel()) if group["flattened"] else p.shape[-2:]
                alike.setdefault((shape, p.dtype, p.device), []).append(p)
        for (shape, *_), ps in alike.items():
            updates = []
            for p in ps:
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros(())  # AdamW looks for it when a state is loaded
                    state["momentum_buffer"] = torch.zeros_like(p)
                state["step"] += 1
                momentum = state["momentum_buffer"]
                gradient: Any = p.grad
                momentum.lerp_(gradient, 1 - group["momentum"])
                update = gradient.lerp(momentum, group["momentum"])
                updates.append(whole_of(update) if _is_cut(p) else local_part(update))
            # Matrices of a shape share one product: a step has dozens of them, and each is small.
            stacks = [u.reshape(-1, *shape) for u in updates]
            ortho = orthogonalized(torch.cat(stacks)).split([len(stack) for stack in stacks])
            for p, update, u in zip(ps, updates, ortho, strict=True):
                own = local_part(p)
                u = u.reshape(update.shape)
                own.mul_(1 - group["lr"] * group["weight_decay"])
                u = part_of(u, p) if _is_cut(p) else u
                own.add_(u.to(p.dtype), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def _is_cut(stack: Tensor) -> bool:
    """Return whether the matrices of a stack are sharded over processes, and not just the stack."""
    return isinstance(stack, DTensor) and any(
        not placement.is_replicate() and getattr(placement, "dim", 0) >= stack.ndim - 2
        for placement in stack.placements
    )
