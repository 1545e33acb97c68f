"""The undocumented parts of transformers that are used here."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def apply_gate(experts: Any, hidden: Tensor) -> Tensor:
    """Return the hidden layer of both halves, as the experts combine them; every decorated class has the method."""
    combined: Tensor = experts._apply_gate(hidden)
    return combined


def has_plain_gate(experts: Any) -> bool:
    """Return whether the halves are combined by transformers' default, ``act(gate) * up``."""
    return type(experts)._apply_gate.__module__ == "transformers.integrations.moe"


def masks_of_documents(model: Any, tokens_BL: Tensor, positions_BL: Tensor) -> dict[str, Tensor] | None:
    """Return the masks of rows of several documents for GPT-OSS, which makes its own without the positions; None: the
    model makes them."""
    if type(model).__name__ != "GptOssForCausalLM":
        return None
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    like_BL1 = tokens_BL[..., None].to(model.dtype)  # only shape and dtype are read
    given = (model.config, like_BL1, None, None, positions_BL)
    return {
        "full_attention": create_causal_mask(*given),
        "sliding_attention": create_sliding_window_causal_mask(*given),
    }
