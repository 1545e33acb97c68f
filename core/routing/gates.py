"""Small modules that turn tokens or ids into logits, one for each kind of gate, in float32 or float64."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.eager import check_devices
from ..torch_internals import is_transformed


def init_gate_(weight: Tensor, init_scale: float) -> None:
    """Draw a weight from a truncated normal of variance ``init_scale / fan_in`` (arXiv 2101.03961, section 2.4)."""
    std = math.sqrt(init_scale / weight.shape[-1])
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def read_scalar(state: dict[str, Any], name: str) -> None:
    """Give a number of an older checkpoint, (), the shape (1,) that it has now, in place: FSDP2 shards no scalars."""
    if name in state and state[name].ndim == 0:
        state[name] = state[name].view(1)


def widened(x_TD: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the tokens in float32 (float64 stays), and the half-precision tokens that a linear gate saves for its
    backward, or None."""
    if x_TD.dtype in (torch.float32, torch.float64):
        return x_TD, None
    return x_TD.float(), x_TD if torch.is_grad_enabled() and not is_transformed() else None


class _KeepHalf(torch.autograd.Function):
    """``F.linear`` in float32 whose backward converts half-precision tokens and weights again: T * D numbers of 4 bytes
    would be twice the experts' own saved tokens."""

    @staticmethod
    def forward(ctx: Any, kept_TD: Tensor, x_TD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(kept_TD, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x_TD, weight.to(x_TD.dtype), None if bias is None else bias.to(x_TD.dtype))

    @staticmethod
    def backward(ctx: Any, dy_TE: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
        kept_TD, weight = ctx.saved_tensors
        wants_x, _, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            (dy_TE @ weight.to(dy_TE.dtype)).to(kept_TD.dtype) if wants_x else None,
            None,
            (dy_TE.t() @ kept_TD.to(dy_TE.dtype)).to(weight.dtype) if wants_weight else None,
            dy_TE.sum(0).to(ctx.bias_dtype) if wants_bias else None,
        )


class LinearGate(nn.Module):
    """``logits = x W^T + b``; the bias ``b`` (E,) starts at zero and is there on demand.

    Args:
        dim: D.
        num_experts: E.
        init_scale: variance of the initial weights times D.
        bias: whether there is a ``b``.
    """

    def __init__(self, dim: int, num_experts: int, init_scale: float = 0.1, bias: bool = False) -> None:
        super().__init__()
        self.init_scale = init_scale
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.bias = nn.Parameter(torch.empty(num_experts)) if bias else None
        LinearGate.reset_parameters(self)  # a subclass's own parameters are not there yet

    def reset_parameters(self) -> None:
        init_gate_(self.weight, self.init_scale)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_TD: Tensor, kept_TD: Tensor | None = None) -> Tensor:
        """Return the logits (T, E) of float32 (T, D) tokens. ``kept_TD`` are the same tokens in half precision, which
        the backward saves instead of them, and which get the gradient."""
        check_devices(x_TD, type(self).__name__, self._parameters)
        if kept_TD is not None:
            return _KeepHalf.apply(kept_TD, x_TD.detach(), self.weight, self.bias)  # type: ignore[no-any-return]
        return F.linear(x_TD, self.weight.to(x_TD.dtype), None if self.bias is None else self.bias.to(x_TD.dtype))

    def noise_std(self, x_TD: Tensor) -> Tensor | None:
        """Return the learned standard deviation of the logits' noise, (T, E), or None."""
        return None


class NoisyGate(LinearGate):
    """A linear gate that learns the noise on its logits: ``std = softplus(x W_noise^T)`` (arXiv 1701.06538, eq. 4)."""

    def __init__(self, dim: int, num_experts: int, init_scale: float = 0.1, bias: bool = False) -> None:
        super().__init__(dim, num_experts, init_scale, bias)
        # With zero weights every expert starts with noise of softplus(0) = 0.69 (appendix A of the paper).
        self.noise_weight = nn.Parameter(torch.zeros(num_experts, dim))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.noise_weight)

    def noise_std(self, x_TD: Tensor) -> Tensor:
        # Softplus underflows to 0 below -104, and the load loss divides by it.
        return F.softplus(F.linear(x_TD, self.noise_weight.to(x_TD.dtype))).clamp_min(1e-6)


class NormedGate(LinearGate):
    """A linear gate of the token at a root mean square of 1: ``logits = (x / rms(x) * s / sqrt(D)) W^T + b``, with a
    learned ``s`` (D,) that starts at 1 (Gemma 4, as its implementations have it).

    The weights start with ``sqrt(D)`` times a linear gate's standard deviation, so that the logits are as large.
    """

    eps = 1e-6

    def __init__(self, dim: int, num_experts: int, init_scale: float = 0.1, bias: bool = False) -> None:
        super().__init__(dim, num_experts, init_scale * dim, bias)
        self.input_scale = nn.Parameter(torch.ones(dim))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.ones_(self.input_scale)

    def forward(self, x_TD: Tensor, kept_TD: Tensor | None = None) -> Tensor:
        check_devices(x_TD, type(self).__name__, self._parameters)
        rms_T1 = (x_TD.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return super().forward(x_TD * rms_T1 * (self.input_scale.to(x_TD.dtype) * x_TD.shape[-1] ** -0.5))


class CosineGate(nn.Module):
    """``logits = cos(P x, e) / temperature`` in a space of few dimensions (X-MoE, arXiv 2204.09179).

    Args:
        dim: D.
        num_experts: E.
        proj_dim: number of dimensions of the space.
        temperature: initial divisor of the cosines; it is learned, and stays at least 0.01.
    """

    # The largest scale is tutel's, exp(log 100), a temperature of 0.01.
    max_log_scale = math.log(100.0)

    def __init__(self, dim: int, num_experts: int, proj_dim: int, temperature: float = 0.5) -> None:
        super().__init__()
        self.temperature = temperature
        self.projection = nn.Parameter(torch.empty(proj_dim, dim))
        self.weight = nn.Parameter(torch.empty(num_experts, proj_dim))
        self.log_scale = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # Lengths do not count; at 1 the gradient of a direction is as large as other weights'.
        init_gate_(self.projection, 1.0)
        init_gate_(self.weight, 1.0)
        nn.init.constant_(self.log_scale, -math.log(self.temperature))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        read_scalar(state_dict, f"{prefix}log_scale")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return the logits (T, E) of float32 (T, D) tokens, within +-1 / temperature."""
        check_devices(x_TD, type(self).__name__, self._parameters)
        dtype = x_TD.dtype
        x_TP = F.normalize(F.linear(x_TD, self.projection.to(dtype)), dim=-1)
        scale = self.log_scale.to(dtype).clamp_max(self.max_log_scale).exp()
        return scale * F.linear(x_TP, F.normalize(self.weight.to(dtype), dim=-1))


class AttentionGate(nn.Module):
    """``logits = softmax(q k^T) v``, with one number per expert in each of q, k and v (Yuan2.0-M32, arXiv 2405.17976):
    the logit of an expert depends on the others' logits. Nothing scales ``q k^T``: the heads have one dimension.

    Args:
        dim: D.
        num_experts: E.
        init_scale: variance of the initial weights times D.
    """

    def __init__(self, dim: int, num_experts: int, init_scale: float = 1.0) -> None:
        super().__init__()
        self.init_scale = init_scale
        self.weight = nn.Parameter(torch.empty(3, num_experts, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init_gate_(self.weight, self.init_scale)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return the logits (T, E) of float32 (T, D) tokens, through (T, E, E) attention."""
        check_devices(x_TD, type(self).__name__, self._parameters)
        E = self.weight.shape[1]
        query_TE, key_TE, value_TE = F.linear(x_TD, self.weight.to(x_TD.dtype).flatten(0, 1)).split(E, dim=-1)
        attention_TEE = torch.bmm(query_TE.unsqueeze(2), key_TE.unsqueeze(1)).softmax(-1)
        return torch.bmm(attention_TEE, value_TE.unsqueeze(2)).squeeze(2)


class TableGate(nn.Module):
    """A table with a row of logits for each id, such as a task's or a language pair's.

    Args:
        num_rows: ids are in ``range(num_rows)``.
        num_experts: E.
        init_scale: variance of the initial logits.
    """

    def __init__(self, num_rows: int, num_experts: int, init_scale: float = 0.1) -> None:
        super().__init__()
        self.init_scale = init_scale
        self.weight = nn.Parameter(torch.empty(num_rows, num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=math.sqrt(self.init_scale))

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the logits (N, E) of int64 (N,) ids, in ``dtype``."""
        check_devices(ids, type(self).__name__, self._parameters)
        return F.embedding(ids, self.weight).to(dtype)


class TokenIdGate(nn.Module):
    """``logits = embedding[token id] W^T`` with a small embedding of its own: it sees no hidden state.

    Args:
        vocab_size: ids are in ``range(vocab_size)``.
        num_experts: E.
        embedding_dim: width of the embedding.
        init_scale: variance of the initial logits.
    """

    def __init__(self, vocab_size: int, num_experts: int, embedding_dim: int, init_scale: float = 0.1) -> None:
        super().__init__()
        self.init_scale = init_scale
        self.embedding = nn.Parameter(torch.empty(vocab_size, embedding_dim))
        self.weight = nn.Parameter(torch.empty(num_experts, embedding_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.embedding)
        init_gate_(self.weight, self.init_scale)

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the logits (T, E) of int64 (T,) ids, in ``dtype``."""
        check_devices(ids, type(self).__name__, self._parameters)
        return F.linear(F.embedding(ids, self.embedding).to(dtype), self.weight.to(dtype))
