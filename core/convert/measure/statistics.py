"""``expert_statistics`` runs a model on batches once and sums up its experts' choices and outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...contract import Rows
from ...experts import Experts
from ...kernels import expert_of_rows
from ...layers import MoE
from ..read.calls import call, evaluating, hooked
from ..read.parts import check_all_here, layers_with_experts

CHUNK = 1024
"""Rows whose outputs are held at once."""


@dataclass(frozen=True)
class ExpertStatistics:
    """Sums over the rows that each expert of a layer computed, in float64 on the experts' device.

    Attributes:
        loads_E: (E,), rows computed.
        gated_norms_E: (E,), sums of ``gate * ||f_e(x)||``, with Euclidean norms.
        norms_E: (E,), sums of ``||f_e(x)||``.
        squares_E: (E,), sums of ``||f_e(x)||^2``.
        outputs_ED: (E, D_out), sums of ``f_e(x)``.
        every_output_ED: (E, D_out), the mean of ``f_e(x)`` over every token, whether it chose e or not; None: they were
            not asked for.
    """

    loads_E: Tensor
    gated_norms_E: Tensor
    norms_E: Tensor
    squares_E: Tensor
    outputs_ED: Tensor
    every_output_ED: Tensor | None = None

    @property
    def mean_output_ED(self) -> Tensor:
        """The mean output of each expert over its rows, (E, D_out); zero where it has none."""
        return self.outputs_ED / self.loads_E.clamp_min(1)[:, None]

    @property
    def spread_E(self) -> Tensor:
        """The sums of ``||f_e(x) - mean||^2`` over the rows of each expert, (E,)."""
        return (self.squares_E - self.outputs_ED.square().sum(1) / self.loads_E.clamp_min(1)).clamp_min(0)


@torch.no_grad()
def expert_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    run: Callable[[nn.Module, Any], Any] | None = None,
    *,
    every_token: bool = False,
) -> dict[str, ExpertStatistics]:
    """Run a model in evaluation over batches and return the statistics of each MoE layer's experts, by its name.

    Each computed row is computed once more, without its gate. No hidden state outlives its batch. Padding and dropped
    pairs do not count, nor do layers of several gates. If the gates scale the experts' input, outputs are computed from
    the scaled tokens.

    Args:
        model: any module with MoE layers, or one of them; its mode is put back afterwards.
        batches: of calibration; a few hundred sequences are common.
        run: calls the model with a batch; None: ``model(batch)``, ``model(*batch)`` for a tuple or list, or
            ``model(**batch)`` for a mapping.
        every_token: compute each expert on every token as well, at E / K times the cost, for ``merge_experts``.

    Raises:
        ValueError: there is no MoE layer or no batch, a layer computed no rows (as attention, picked neurons and merged
            experts), or experts are split over ranks.

    Example::

        statistics = core.expert_statistics(model, loader, lambda model, batch: model(batch["pixels"]))
    """
    sums: dict[str, _Sums] = {}
    for name, layer in layers_with_experts(model).items():
        if isinstance(layer, MoE):
            check_all_here(layer.experts, "its statistics are taken")
            sums[name] = _Sums(layer.experts, every_token)
    with evaluating(model), hooked([of.experts.register_forward_pre_hook(of.add) for of in sums.values()]):
        for batch in batches:
            call(model, batch, run)
    for name, of in sums.items():
        if of.statistics is None:
            raise ValueError(f"layer {name!r} computed no rows of experts in these batches: it has no statistics")
    return {name: of.result() for name, of in sums.items()}


class _Sums:
    """A hook before some experts that adds up their statistics.

    Attributes:
        statistics: the sums so far; ``every_output_ED`` is a sum as well. None: no row was computed.
    """

    def __init__(self, experts: Experts, every_token: bool) -> None:
        self.experts, self.every_token = experts, every_token
        self.statistics: ExpertStatistics | None = None
        self.num_tokens = 0
        self._computing = False

    def add(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Add the rows that the experts are about to compute."""
        if self._computing or not isinstance(args[0], Rows) or args[1:] not in ((), ("rows",)):
            return
        self._computing = True
        try:
            self._add_rows(args[0].materialized())
        finally:
            self._computing = False

    def _add_rows(self, rows: Rows) -> None:
        E, live = rows.offsets_E.shape[0], int(rows.offsets_E[-1])
        valid_T = getattr(self.experts, "valid_T", None)  # adopted blocks compute padding
        for start in range(0, live, CHUNK):
            end = min(start + CHUNK, live)
            part = replace(
                rows,
                x=rows.x[start:end],
                row_index_R=rows.row_index_R[start:end],
                offsets_E=(rows.offsets_E - start).clamp(0, end - start),
                gates_R=torch.ones_like(rows.gates_R[start:end]),
                plan=None,
            )
            y_RD = self.experts(part).x.double()
            real_R = y_RD.new_ones(len(y_RD)) if valid_T is None else valid_T[part.row_index_R].to(y_RD)
            y_RD = y_RD * real_R[:, None]
            expert_R, norm_R = expert_of_rows(part.gates_R, part.offsets_E), y_RD.norm(dim=1)
            before = self._begun(E, y_RD)

            def plus(total: Tensor, value: Tensor, of: Tensor = expert_R) -> Tensor:
                return total.index_add(0, of, value)

            self.statistics = ExpertStatistics(
                plus(before.loads_E, real_R),
                plus(before.gated_norms_E, norm_R * rows.gates_R[start:end].double()),
                plus(before.norms_E, norm_R),
                plus(before.squares_E, norm_R.square()),
                plus(before.outputs_ED, y_RD),
                before.every_output_ED,
            )
        if self.every_token and self.statistics is not None:
            self._add_every_token(rows, live, valid_T)

    def _add_every_token(self, rows: Rows, live: int, valid_T: Tensor | None) -> None:
        """Add every expert's output for each token that some expert computes, but for padding."""
        assert self.statistics is not None
        # A token has several rows: one of them represents it.
        token_R = rows.row_index_R[:live]
        row_of_token = torch.full((rows.num_tokens,), -1, device=token_R.device)
        row_of_token[token_R] = torch.arange(live, device=token_R.device)
        if valid_T is not None:
            row_of_token[~valid_T] = -1
        x_TD = rows.x[row_of_token[row_of_token >= 0]]
        total = self.statistics.every_output_ED
        for x_CD in x_TD.split(max(1, CHUNK // rows.offsets_E.shape[0])):
            own = self.experts(x_CD, "each").double().sum(0)
            total = own if total is None else total + own
        self.num_tokens += len(x_TD)
        self.statistics = replace(self.statistics, every_output_ED=total)

    def _begun(self, E: int, y_RD: Tensor) -> ExpertStatistics:
        if self.statistics is not None:
            return self.statistics
        zero_E = y_RD.new_zeros(E)
        return ExpertStatistics(zero_E, zero_E, zero_E, zero_E, y_RD.new_zeros(E, y_RD.shape[1]))

    def result(self) -> ExpertStatistics:
        """Return the statistics, with a mean over every token if there is one."""
        assert self.statistics is not None
        total_ED = self.statistics.every_output_ED
        return (
            self.statistics
            if total_ED is None
            else replace(self.statistics, every_output_ED=total_ED / self.num_tokens)
        )
