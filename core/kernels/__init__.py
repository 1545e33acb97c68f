"""Kernel backends: each offers the same few functions of plain tensors.

    topk_gate(logits_TE, ...)            scores, chosen experts and gates
    sort_pairs(expert_ids_N, E)          a stable order of the pairs by expert, and the offsets of the experts
    expert_ffn(x_TD, row_index_R, ...)   the two- or three-matrix expert over its rows, weighted by the gates
    expert_linear(x_RD, w, ...)          one product of each row with its expert's matrix
    combine(y_RD, ...)                   sum over the rows of each token

``eager`` is the oracle and reads like the equations. ``cpu`` and ``grouped`` are held to it in output and gradients.
"""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType

import torch

from . import cpu, eager, grouped

BACKENDS: dict[str, ModuleType] = {"eager": eager, "cpu": cpu, "grouped": grouped}


def resolve_backend(name: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """The backend that will run: ``name`` itself where it can, else the next best with one warning.

    Args:
        name: "auto", or a key of ``BACKENDS``.
        device: where the tokens are.
        dtype: of the experts' products.

    Returns:
        A key of ``BACKENDS``.

    Raises:
        ValueError: the name is not a backend.
    """
    kind = torch.device(device).type
    if name == "auto":
        return "cpu" if kind == "cpu" else "grouped" if BACKENDS["grouped"].supports(kind, dtype) else "eager"
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r} is not one of auto, {', '.join(BACKENDS)}")
    if BACKENDS[name].supports(kind, dtype):
        return name
    if not torch.compiler.is_compiling():
        _warn_fallback(name, kind, dtype)
    return "eager"


@cache
def _warn_fallback(name: str, kind: str, dtype: torch.dtype) -> None:
    warnings.warn(f"backend={name!r} does not run {dtype} on {kind}: using 'eager' (correct, slower)", stacklevel=3)


__all__ = ["BACKENDS", "resolve_backend"]
