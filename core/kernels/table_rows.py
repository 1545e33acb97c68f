"""Matmuls with rows that each token picks out of a large table: one-neuron experts, and the best keys of a query.

``neurons`` and ``best_keys`` are written twice. The plain ones read like the equations, copy every picked row, and can
be compiled, exported, transformed and differentiated twice. The others run as they are, on any device: they go through
the tokens in chunks that stay in the processor's cache, save no picked row for the backward, and make the gradient of a
table either dense or of only its picked rows.

On 2 cores of an AMD EPYC, torch 2.13.0+cpu, 4,096 tokens with 128 of 2^20 rows of 128 numbers (2026-11-27): the dots
took 28 ms in chunks that share one buffer and 518 ms with a new one each; torch's own
``_embedding_bag_per_sample_weights_backward`` 176 ms. Sums by ``embedding_bag`` took 59 ms.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..torch_internals import is_watched
from .eager import ACTIVATIONS, outside_autocast

CHUNK_BYTES = 1 << 22
"""Size of the buffer of a chunk of tokens: some megabytes stay in the cache."""


def neurons(
    x_TD: Tensor,
    u: Tensor,
    v: Tensor,
    ids_TK: Tensor,
    gates_TK: Tensor,
    activation: str,
    *,
    row_sparse: bool = False,
    plain: bool = False,
) -> Tensor:
    """Return ``y_t = sum over k of g_tk act(x_t . u_i) v_i`` with ``i = ids_tk``, experts of one neuron each.

    A token may pick a row twice. Inner products and sums are float32 when tokens or tables are in half precision.

    Args:
        x_TD: (T, D) tokens; a token that picks no expert may hold anything.
        u: (E, D).
        v: (E, D_out).
        ids_TK: int64 (T, K), rows of ``u`` and ``v``; E if nothing is computed.
        gates_TK: (T, K).
        activation: a key of ``ACTIVATIONS``.
        row_sparse: the gradients of ``u`` and ``v`` are sparse tensors of the picked rows. If ``plain`` runs they
            are dense nevertheless. To make them, the host waits for the device.
        plain: run the version that copies every picked row.

    Returns:
        (T, D_out), in the dtype of ``x_TD``.
    """
    with outside_autocast(x_TD.device):
        wide = torch.promote_types(torch.promote_types(x_TD.dtype, u.dtype), torch.float32)
        live_TK = ids_TK < u.shape[0]
        x_wide = x_TD.masked_fill(~live_TK.any(1, keepdim=True), 0.0).to(wide)
        gates_TK = gates_TK.to(wide)
        tensors = (x_wide, u, v, gates_TK)
        if plain or is_watched(*tensors) or x_TD.is_meta or not ids_TK.numel():
            y_TD = plain_neurons(x_wide, u, v, ids_TK, gates_TK, activation)
        else:
            y_TD = _Neurons.apply(x_wide, u, v, ids_TK, gates_TK, activation, row_sparse)
        return y_TD.to(x_TD.dtype)


def plain_neurons(x_TD: Tensor, u: Tensor, v: Tensor, ids_TK: Tensor, gates_TK: Tensor, activation: str) -> Tensor:
    """Run ``neurons`` as it is written."""
    live_TK = ids_TK < u.shape[0]
    row_TK = ids_TK.masked_fill(~live_TK, 0)
    h_TK = (u[row_TK].to(x_TD.dtype) @ x_TD[:, :, None]).squeeze(-1)
    c_TK = (gates_TK * ACTIVATIONS[activation](h_TK)).masked_fill(~live_TK, 0.0)
    return (c_TK[:, None, :] @ v[row_TK].to(x_TD.dtype)).squeeze(1)


class _Neurons(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        u: Tensor,
        v: Tensor,
        ids_TK: Tensor,
        gates_TK: Tensor,
        activation: str,
        row_sparse: bool,
    ) -> Tensor:
        live_TK = ids_TK < u.shape[0]
        row_TK = ids_TK.clamp_max(u.shape[0] - 1)
        h_TK = dots(x_TD, u, row_TK)
        c_TK = (gates_TK * ACTIVATIONS[activation](h_TK)).masked_fill_(~live_TK, 0.0)
        ctx.save_for_backward(x_TD, u, v, ids_TK, gates_TK, h_TK)
        ctx.activation, ctx.row_sparse = activation, row_sparse
        return sums(c_TK, v, row_TK)

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> Any:
        x_TD, u, v, ids_TK, gates_TK, h_TK = ctx.saved_tensors
        wants = ctx.needs_input_grad
        if torch.is_grad_enabled():  # a second derivative follows
            given = [t for t, wanted in zip((x_TD, u, v, gates_TK), (*wants[:3], wants[4]), strict=True) if wanted]
            y_TD = plain_neurons(x_TD, u, v, ids_TK, gates_TK, ctx.activation)
            grads = iter(torch.autograd.grad(y_TD, given, dy_TD, create_graph=True))
            return tuple(next(grads) if wanted else None for wanted in wants)
        dead_TK = ids_TK >= u.shape[0]
        row_TK = ids_TK.clamp_max(u.shape[0] - 1)
        with torch.enable_grad():
            h_TK = h_TK.requires_grad_()
            a_TK = ACTIVATIONS[ctx.activation](h_TK)
        dc_TK = dots(dy_TD, v, row_TK).masked_fill_(dead_TK, 0.0)
        (dh_TK,) = torch.autograd.grad(a_TK, h_TK, dc_TK * gates_TK)
        a_TK = a_TK.detach()
        c_TK = (gates_TK * a_TK).masked_fill_(dead_TK, 0.0)
        du, dv = _table_gradients(
            ids_TK, ((u, x_TD, dh_TK) if wants[1] else None, (v, dy_TD, c_TK) if wants[2] else None), ctx.row_sparse
        )
        dx_TD = sums(dh_TK, u, row_TK) if wants[0] else None
        return dx_TD, du, dv, None, dc_TK * a_TK if wants[4] else None, None, None


def chunks(total: int, bytes_each: int) -> Iterator[slice]:
    """Yield slices of ``range(total)`` whose items take about ``CHUNK_BYTES`` together."""
    size = max(1, CHUNK_BYTES // max(bytes_each, 1))
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def dots(x_TD: Tensor, table: Tensor, row_TK: Tensor) -> Tensor:
    """Return ``x_t . table[row_tk]``, (T, K), without a graph."""
    (T, K), D = row_TK.shape, x_TD.shape[1]
    out_TK = x_TD.new_empty(T, K)
    buffer: Tensor | None = None
    for part in chunks(T, K * D * x_TD.element_size()):
        index_R = row_TK[part].reshape(-1)
        if buffer is None:  # the first chunk is the largest; a new buffer each time costs most of the time
            buffer = table.new_empty(index_R.shape[0], D)
        picked_RD = torch.index_select(table, 0, index_R, out=buffer[: index_R.shape[0]]).to(x_TD.dtype)
        torch.sum(picked_RD.view(-1, K, D).mul_(x_TD[part, None]), -1, out=out_TK[part])
    return out_TK


def sums(c_TK: Tensor, table: Tensor, row_TK: Tensor) -> Tensor:
    """Return ``sum over k of c_tk table[row_tk]``, (T, D), without a graph."""
    if table.dtype == c_TK.dtype:
        return F.embedding_bag(row_TK, table, per_sample_weights=c_TK, mode="sum")
    out_TD = c_TK.new_empty(c_TK.shape[0], table.shape[1])
    for part in chunks(c_TK.shape[0], c_TK.shape[1] * table.shape[1] * c_TK.element_size()):
        out_TD[part] = (c_TK[part, None, :] @ table[row_TK[part]].to(c_TK.dtype)).squeeze(1)
    return out_TD


Outer = tuple[Tensor, Tensor, Tensor]
"""A table, tokens (T, D) and weights (T, K): the table's row of a pair gets the pair's weight times its token."""


def _table_gradients(ids_TK: Tensor, parts: tuple[Outer | None, ...], row_sparse: bool) -> list[Tensor | None]:
    """Return the gradient of each table; None for one that is not wanted."""
    first = next((part for part in parts if part is not None), None)
    if first is None:
        return [None for _ in parts]
    K, E = ids_TK.shape[1], first[0].shape[0]
    if not row_sparse and ids_TK.device.type != "cpu":
        return [None if part is None else _added(ids_TK.clamp_max(E - 1), *part) for part in parts]
    sorted_N, order_N = torch.sort(ids_TK.flatten())
    row_U, count_U = torch.unique_consecutive(sorted_N, return_counts=True)
    if row_U.shape[0] and row_U[-1] >= E:  # pairs that are not computed
        row_U, count_U = row_U[:-1], count_U[:-1]
    ends_U = count_U.cumsum(0)
    order_N = order_N[: int(count_U.sum())]
    token_N, grads = order_N // K, list[Tensor | None]()
    for part in parts:
        if part is None:
            grads.append(None)
            continue
        table, x_TD, c_TK = part
        if row_U.shape[0]:
            c_N = c_TK.flatten().index_select(0, order_N)
            grad_UD = F.embedding_bag(token_N, x_TD, ends_U - count_U, per_sample_weights=c_N, mode="sum")
        else:
            grad_UD = x_TD.new_empty(0, x_TD.shape[1])
        grad_UD = grad_UD.to(table.dtype)
        if row_sparse:
            sparse = torch.sparse_coo_tensor(
                row_U[None], grad_UD, table.shape, is_coalesced=True, check_invariants=False
            )
            grads.append(sparse)
        else:
            grads.append(torch.zeros_like(table).index_copy_(0, row_U, grad_UD))
    return grads


def _added(row_TK: Tensor, table: Tensor, x_TD: Tensor, c_TK: Tensor) -> Tensor:
    """Return the dense gradient of a table without asking the device how many rows there are."""
    grad = torch.zeros(table.shape, dtype=x_TD.dtype, device=table.device)
    for part in chunks(x_TD.shape[0], c_TK.shape[1] * x_TD.shape[1] * x_TD.element_size() // 64):
        grad.index_add_(0, row_TK[part].flatten(), (c_TK[part, :, None] * x_TD[part, None, :]).flatten(0, 1))
    return grad.to(table.dtype)


def best_keys(q_RQ: Tensor, keys_nQ: Tensor, top_k: int, *, plain: bool = False) -> tuple[Tensor, Tensor]:
    """Return the ``top_k`` largest inner products of each query with the keys, best first, and their keys.

    The scores of a query with all keys are not kept.

    Args:
        q_RQ: (R, Q).
        keys_nQ: (n, Q), in the dtype of the queries.
        top_k: K.
        plain: run the version that keeps all scores.

    Returns:
        (R, K) scores and int64 (R, K) indices of keys.
    """
    if plain or is_watched(q_RQ, keys_nQ) or q_RQ.is_meta or not q_RQ.shape[0]:
        best = (q_RQ @ keys_nQ.t()).topk(top_k, dim=-1)
        return best.values, best.indices
    values_RK, index_RK = _BestKeys.apply(q_RQ, keys_nQ, top_k)
    return values_RK, index_RK


class _BestKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_RQ: Tensor, keys_nQ: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        R, n = q_RQ.shape[0], keys_nQ.shape[0]
        values_RK, index_RK = q_RQ.new_empty(R, top_k), torch.empty(R, top_k, dtype=torch.int64, device=q_RQ.device)
        buffer: Tensor | None = None
        for part in chunks(R, n * q_RQ.element_size()):
            q_PQ = q_RQ[part]
            if buffer is None:
                buffer = q_RQ.new_empty(q_PQ.shape[0], n)
            scores_Pn = torch.mm(q_PQ, keys_nQ.t(), out=buffer[: q_PQ.shape[0]])
            torch.topk(scores_Pn, top_k, dim=-1, out=(values_RK[part], index_RK[part]))
        ctx.save_for_backward(q_RQ, keys_nQ, index_RK)
        ctx.mark_non_differentiable(index_RK)
        return values_RK, index_RK

    @staticmethod
    def backward(ctx: Any, d_RK: Tensor, _: Tensor) -> Any:
        q_RQ, keys_nQ, index_RK = ctx.saved_tensors
        wants_q, wants_keys, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return (*_plain_gradients(q_RQ, keys_nQ, index_RK, d_RK, wants_q, wants_keys), None)
        dq_RQ = torch.empty_like(q_RQ) if wants_q else None
        dkeys_nQ = torch.zeros_like(keys_nQ) if wants_keys else None
        buffer: Tensor | None = None
        n = keys_nQ.shape[0]
        for part in chunks(q_RQ.shape[0], n * q_RQ.element_size()):
            index_PK = index_RK[part]
            if buffer is None:
                buffer = q_RQ.new_empty(index_PK.shape[0], n)
            d_Pn = buffer[: index_PK.shape[0]].zero_().scatter_(1, index_PK, d_RK[part])
            if dq_RQ is not None:
                torch.mm(d_Pn, keys_nQ, out=dq_RQ[part])
            if dkeys_nQ is not None:
                dkeys_nQ.addmm_(d_Pn.t(), q_RQ[part])
        return dq_RQ, dkeys_nQ, None


def _plain_gradients(
    q_RQ: Tensor, keys_nQ: Tensor, index_RK: Tensor, d_RK: Tensor, wants_q: bool, wants_keys: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of queries and keys with a graph."""
    d_Rn = d_RK.new_zeros(d_RK.shape[0], keys_nQ.shape[0]).scatter(1, index_RK, d_RK)
    return d_Rn @ keys_nQ if wants_q else None, d_Rn.t() @ q_RQ if wants_keys else None
