"""Kernel backends: each offers the same few functions of plain tensors.

    topk_gate(logits_TE, ...)            scores, chosen experts and gates
    sort_pairs(expert_ids_N, E)          a stable order of the pairs by expert, and the offsets of the experts
    queue_ranks(queue_TK, ...)           each pair's place in the queue of its expert
    expert_ffn(x_TD, rows, ...)          the two- or three-matrix expert over its rows, weighted by the gates
    expert_linear(x_RD, w, ...)          one product of each row with its expert's matrix
    combine(y_RD, ...)                   sum over the rows of each token

Two more are the same on every backend but ``eager``, which copies all that it picks (``table_rows.py``)::

    neurons(x_TD, u, v, ids_TK, ...)     experts of one neuron, picked out of two tables
    best_keys(q_RQ, keys_nQ, K)          the keys with the largest inner products

The weights of ``expert_ffn`` and ``expert_linear`` may be quantized (``quantized.py``): a matrix is then dequantized
from integers and scales when it is multiplied, and never stored.

``eager`` is the oracle and reads like the equations. ``cpu``, ``grouped`` and ``triton`` are held to it in output and
gradients. The functions here take a backend's name, resolve it and call the backend; ``triton`` leaves cases beyond its
limits to ``grouped`` or ``eager``. Experts, dispatchers and layers use these functions, and the few helpers that are
exported with them, and know no backend by name.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Annotated, Any

import torch
from torch import Tensor

from ..fields import OneOf
from ..torch_internals import is_in_torch_dispatch_mode, is_transformed
from . import cpu, eager, grouped, table_rows, triton_ops
from .cpu.products import Linear, linear
from .eager import (
    ACTIVATIONS,
    ALL_ACTIVATIONS,
    SCORE_FUNCS,
    FFNWeights,
    RowIndex,
    Sorted,
    TopK,
    accumulate_dtype,
    check_devices,
    count_experts,
    is_full,
    outside_autocast,
)
from .fallback import warn_once
from .given import choosing, given_gate
from .grouped import expert_of_rows
from .low_rank import AdaptedWeight, ThroughQuantized
from .quantized import QuantizedWeight, Weight, dequantize, quantize

BACKENDS: dict[str, ModuleType] = {"eager": eager, "cpu": cpu, "grouped": grouped, "triton": triton_ops}
Backend = Annotated[str, OneOf("auto", *BACKENDS)]


def _refuse_second_derivative(ctx: Any, *grads: Tensor) -> Tensor:
    raise RuntimeError("backend='triton' has first derivatives alone: use backend='eager' for second ones")


for _op in ("triton_expert_ffn_backward", "triton_linear_dw", "triton_gate_backward"):
    torch.library.register_autograd(f"moesaic::{_op}", _refuse_second_derivative)


def check_backend(name: str) -> None:
    """Raise a ``ValueError`` if ``name`` is neither "auto" nor a backend."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend={name!r} is not one of auto, {', '.join(BACKENDS)}")


def resolve_backend(name: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """Return the backend that will run: ``name`` itself where it can, else the next best with one warning.

    "auto" is ``cpu`` on a CPU; on CUDA ``triton``, else ``grouped`` for the same dtypes, else ``eager``. (If it is
    ``triton``, experts' matmuls run on the fastest of the three, measured when a shape is first met.) Under a transform
    of ``torch.func`` and in forward-mode differentiation it is ``eager``, whatever the name: custom ops know neither.
    On the meta device it is ``cpu``, whatever the name.

    Args:
        name: "auto", or a key of ``BACKENDS``.
        device: device of the tokens.
        dtype: dtype of the experts' matmuls.

    Returns:
        A key of ``BACKENDS``.

    Raises:
        ValueError: the name is not a backend.
    """
    device = torch.device(device)
    check_backend(name)
    if device.type == "meta":
        return "cpu"  # the oracle would read counts, which are not there
    if is_transformed():
        return "eager"
    if name == "auto":
        if device.type == "cpu":
            return "cpu"
        if triton_ops.supports(device, dtype):
            return "triton"
        best = "grouped" if grouped.supports(device, dtype) else "eager"
        if device.type == "cuda" and dtype != torch.float64:
            warn_once(f"backend='auto' runs {best!r} on {device.type}: {triton_ops.missing(device, dtype)}")
        return best
    if BACKENDS[name].supports(device, dtype):
        return name
    if name == "triton" and device.type == "cuda" and grouped.supports(device, dtype):
        warn_once(f"backend='triton' runs 'grouped' on {device.type}: {triton_ops.missing(device, dtype)}")
        return "grouped"
    why = f": {triton_ops.missing(device, dtype)}" if name == "triton" else ""
    warn_once(f"backend={name!r} does not run {dtype} on {device.type}{why}: using 'eager' (correct, slower)")
    return "eager"


def _fastest(
    kernel: str, backend: str, x: Tensor, num_rows: int, weights: tuple[Any, ...], flags: tuple[str, ...], call: Any
) -> ModuleType:
    """Return the backend of an expert's matmul: on a GPU under "auto" the one that was measured to be the fastest.

    Nothing is measured in a compiled graph, nor under a dispatch mode, which would see the measurement: Triton it is.

    Args:
        kernel, backend: the function's name, and the name that its caller gives.
        x: the tokens or rows.
        num_rows: rows of all experts.
        weights: the first has the experts along its first axis.
        flags: what else tells calls apart.
        call: computes the matmul, given a backend, ``x`` and ``weights``.
    """
    name = resolve_backend(backend, x.device, x.dtype)
    if backend != "auto" or name != "triton" or not _may_measure(x):
        return BACKENDS[name]
    inputs = (x, *weights)
    learns = _learns(*inputs)

    def run(name: str) -> None:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):  # not an outer checkpoint's hooks
            own = [t.detach().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for t in inputs]
            y = call(BACKENDS[name], *own)
            if learns:
                torch.autograd.grad(y, [t for t in own if isinstance(t, Tensor) and t.requires_grad], y.detach())

    kinds = (None if w is None else "float" if isinstance(w, Tensor) else type(w).__name__ for w in weights)
    shapes = (*(s for w in weights if w is not None for s in w.shape), *kinds)
    flags = (*flags, "training" if learns else "inference")
    key = triton_ops.key_of(kernel, shapes, flags, x.dtype, num_rows / max(weights[0].shape[0], 1))
    names = ("triton", *(n for n in ("grouped", "eager") if BACKENDS[n].supports(x.device, x.dtype)))
    return BACKENDS[triton_ops.fastest(key, x.device, {n: partial(run, n) for n in names})]


def _may_measure(x: Tensor) -> bool:
    return not torch.compiler.is_compiling() and x.is_cuda and type(x) is Tensor and not is_in_torch_dispatch_mode()


def _learns(*inputs: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs)


def topk_gate(logits_TE: Tensor, top_k: int, *, backend: str = "auto", **options: Any) -> TopK:
    """Run the backend's ``topk_gate``; see ``eager.topk_gate``. Inside ``core.replay`` the choice is given."""
    given = given_gate(logits_TE, top_k, **options)
    if given is not None:
        return given
    kernels = BACKENDS[resolve_backend(backend, logits_TE.device, logits_TE.dtype)]
    best: TopK = kernels.topk_gate(logits_TE, top_k, **options)
    return best


def sort_pairs(expert_ids_N: Tensor, tokens_per_expert_E: Tensor, *, backend: str = "auto") -> Sorted:
    """Run the backend's ``sort_pairs``; see ``eager.sort_pairs``."""
    kernels = BACKENDS[resolve_backend(backend, expert_ids_N.device, torch.float32)]
    placed: Sorted = kernels.sort_pairs(expert_ids_N, tokens_per_expert_E)
    return placed


def queue_ranks(queue_TK: Tensor, served_T: Tensor | None, num_queues: int, *, backend: str = "auto") -> Tensor:
    """Run the backend's ``queue_ranks``; see ``eager.queue_ranks``."""
    kernels = BACKENDS[resolve_backend(backend, queue_TK.device, torch.float32)]
    rank_TK: Tensor = kernels.queue_ranks(queue_TK, served_T, num_queues)
    return rank_TK


def expert_ffn(
    x: Tensor, rows: RowIndex, gates_R: Tensor, weights: FFNWeights, activation: str, *, backend: str = "auto"
) -> Tensor:
    """Run the backend's ``expert_ffn``; see ``eager.expert_ffn``.

    With an ``AdaptedWeight``, and with a gradient through quantized matrices, each matmul is computed by itself.
    """
    matrices = (weights.w_in, weights.w_gate, weights.w_out)
    if any(isinstance(w, AdaptedWeight) for w in matrices) or (
        isinstance(weights.w_in, QuantizedWeight) and _learns(x, gates_R, weights.b_in, weights.b_out)
    ):
        return grouped.expert_ffn(x, rows, gates_R, weights, activation, partial(expert_linear, backend=backend))

    def call(kernels: ModuleType, x: Tensor, *own: Any) -> Tensor:
        y: Tensor = kernels.expert_ffn(x, rows, own[-1], FFNWeights(*own[:-1]), activation)
        return y

    inputs = (*weights, gates_R)
    return call(_fastest("expert_ffn", backend, x, gates_R.shape[0], inputs, (activation,), call), x, *inputs)


def expert_linear(
    x_RD: Tensor, w: Weight | AdaptedWeight, offsets_E: Tensor, b: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Run the backend's ``expert_linear``; see ``eager.expert_linear``. Quantized matrices are frozen.

    An ``AdaptedWeight`` is multiplied as its base, and its updates by two grouped matmuls each.
    """
    if isinstance(w, AdaptedWeight):
        y_RF = expert_linear(x_RD, w.base, offsets_E, b, backend=backend)
        for a, b_of_update, scale in w.updates:
            h_Rr = expert_linear(x_RD, a, offsets_E, backend=backend) * scale
            y_RF = y_RF + expert_linear(h_Rr, b_of_update, offsets_E, backend=backend)
        return y_RF
    if isinstance(w, QuantizedWeight) and _learns(x_RD, b):
        y_RF = ThroughQuantized.apply(x_RD, w, offsets_E, partial(expert_linear, backend=backend))
        return y_RF if b is None else grouped.add_bias(y_RF, b, offsets_E)

    def call(kernels: ModuleType, x_RD: Tensor, w: Weight, b: Tensor | None) -> Tensor:
        y_RF: Tensor = kernels.expert_linear(x_RD, w, offsets_E, b)
        return y_RF

    return call(_fastest("expert_linear", backend, x_RD, x_RD.shape[0], (w, b), (), call), x_RD, w, b)


def combine(y_RD: Tensor, rows: RowIndex, gates_R: Tensor | None, num_tokens: int, *, backend: str = "auto") -> Tensor:
    """Run the backend's ``combine``; see ``eager.combine``."""
    kernels = BACKENDS[resolve_backend(backend, y_RD.device, y_RD.dtype)]
    y_TD: Tensor = kernels.combine(y_RD, rows, gates_R, num_tokens)
    return y_TD


def neurons(
    x_TD: Tensor,
    u: Tensor,
    v: Tensor,
    ids_TK: Tensor,
    gates_TK: Tensor,
    activation: str,
    *,
    row_sparse: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Run ``table_rows.neurons``, with "eager" the plain one."""
    plain = resolve_backend(backend, x_TD.device, torch.float32) == "eager"
    return table_rows.neurons(x_TD, u, v, ids_TK, gates_TK, activation, row_sparse=row_sparse, plain=plain)


def best_keys(q_RQ: Tensor, keys_nQ: Tensor, top_k: int, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Run ``table_rows.best_keys``, with "eager" the plain one."""
    plain = resolve_backend(backend, q_RQ.device, torch.float32) == "eager"
    return table_rows.best_keys(q_RQ, keys_nQ, top_k, plain=plain)


__all__ = [
    "ACTIVATIONS",
    "ALL_ACTIVATIONS",
    "AdaptedWeight",
    "BACKENDS",
    "Backend",
    "FFNWeights",
    "Linear",
    "QuantizedWeight",
    "SCORE_FUNCS",
    "RowIndex",
    "Weight",
    "accumulate_dtype",
    "best_keys",
    "check_backend",
    "check_devices",
    "choosing",
    "combine",
    "count_experts",
    "dequantize",
    "expert_ffn",
    "expert_linear",
    "expert_of_rows",
    "is_full",
    "linear",
    "neurons",
    "outside_autocast",
    "quantize",
    "queue_ranks",
    "resolve_backend",
    "sort_pairs",
    "topk_gate",
]
