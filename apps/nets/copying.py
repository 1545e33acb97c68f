"""A read-out that copies: words that are in the source can be written though the vocabulary makes them unlikely."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apps.nets.decode_cache import Memory
from core.kernels import cpu


class CopyGate(nn.Module):
    """The pointer-generator of See et al. (arXiv 1704.04368): a mixture of the vocabulary and the source's words.

    ``p(v) = g softmax(logits)_v + (1 - g) sum of a_s over the places s of the source where v is``, with the attention
    ``a = softmax(m_s . (W h) / sqrt(D))`` of one head over the encoder's output m, and
    ``g = sigmoid(w . (h, sum of a_s m_s) + b)``.

    Args:
        dim: D.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = cpu.Linear(dim, dim, bias=False)
        self.gate = nn.Linear(2 * dim, 1)

    def forward(self, h_BLD: Tensor, source: Memory) -> tuple[Tensor, Tensor]:
        """Return the attention a, (B, L, S), and the share g of the vocabulary, (B, L, 1)."""
        score_BLS = self.query(h_BLD) @ source.x_BSD.transpose(1, 2) * source.x_BSD.shape[-1] ** -0.5
        weight_BLS = score_BLS.masked_fill(~source.valid_BS[:, None], torch.finfo(score_BLS.dtype).min).softmax(-1)
        return weight_BLS, self.gate(torch.cat((h_BLD, weight_BLS @ source.x_BSD), -1)).sigmoid()

    @staticmethod
    def mix(logits_TV: Tensor, weight_TS: Tensor, gate_T1: Tensor, ids_TS: Tensor) -> Tensor:
        """Return the logarithm of the mixture, (..., V); ``ids_TS`` are the source's. It is computed in float32."""
        dtype = torch.promote_types(logits_TV.dtype, torch.float32)
        p_TV = logits_TV.to(dtype).softmax(-1) * gate_T1
        p_TV = p_TV.scatter_add(-1, ids_TS, (weight_TS * (1 - gate_T1)).to(dtype))
        return p_TV.clamp_min(torch.finfo(dtype).tiny).log()
