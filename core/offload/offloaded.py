"""``OffloadedExperts``: computes with experts that are kept elsewhere, through slots on the device."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..contract import Rows
from ..experts import Experts
from ..experts.adapters import CHILD
from ..kernels import accumulate_dtype
from .prediction import Forecast, Scores
from .slots import Expert, SlotPool
from .statistics import OffloadStatistics
from .stores import FileStore, Store


@dataclass
class Offloaded:
    """A module of experts that is offloaded.

    Attributes:
        name: its dotted name in the model.
        experts: the module, whose parameters are in the store.
        store: storage of the parameters.
        gate: the shares of its experts by the gate of its layer, or None; see ``Forecast``.
        inner: a module of the same kind whose experts are the slots of ``pool``.
        statistics: its counters.
    """

    name: str
    experts: Experts
    store: Store
    gate: Scores | None
    pool: SlotPool = field(init=False)
    inner: Experts = field(init=False)
    statistics: OffloadStatistics = field(default_factory=OffloadStatistics)

    def join(self, pool: SlotPool) -> None:
        """Compute with the slots of a pool from now on."""
        self.pool = pool
        # A copy with the pool's tensors in the place of the stacked ones. What all experts share it shares too.
        own = {id(t): t for t in (*self.experts.parameters(), *self.experts.buffers())}
        own |= {id(t): pool.tensors[name] for name, t in stacked(self.experts).items()}
        self.inner = copy.deepcopy(self.experts, own).eval()
        self.inner.num_experts = pool.count
        self.inner._forward_pre_hooks.clear()
        self.inner._forward_hooks.clear()
        self._state = self._look()

    def _look(self) -> list[tuple[int, int]]:
        """Return a value that changes with the stacked tensors; tensors of inference mode count no changes."""
        return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in stacked(self.experts).values()]

    def renew(self, number: int) -> None:
        """Empty the slots of this module, number ``number`` of the pool, if its tensors were changed in place.

        Raises:
            ValueError: the tensors were replaced, or changed in memory while a file keeps them.
        """
        state = self._look()
        if state == self._state:
            return
        if isinstance(self.store, FileStore) or [a for a, _ in state] != [b for b, _ in self._state]:
            raise ValueError(
                f"the experts {self.name} were changed after they were stored: change them before core.offload_experts"
            )
        self.pool.forget(number)
        self._state = state


class OffloadedExperts:
    """The offloaded experts of a model: their slots, their counters, and how rows are computed with them.

    ``offload_experts`` makes it. The modules of experts stay in their places with all their parameters, which are the
    store's: a model's state dict is complete, and a copy or pickle of the model is one without slots.

    A call computes its experts in groups of at most as many as there are slots. An expert's matmuls are the same as
    without slots, and so is the order in which a token's rows are summed. On a CPU with its own backend the output is
    therefore the same to the last bit, but for experts that scale or sum gates by themselves (``LoRA`` with a scale,
    ``IA3``, ``PEER``) and for hidden widths that are not a multiple of 32 numbers, or 64 in half precision: torch
    computes the end of a tensor by other instructions, which round differently. Elsewhere it is equal to rounding.

    Calls from several threads wait for each other. Experts in host memory that are changed in place, between calls and
    not through ``.data``, are fetched again; experts in a file are not to be changed.

    Attributes:
        left: names of the layers' experts that stay as they are, since every token takes all of them.
    """

    def __init__(self, members: list[Offloaded], pools: list[SlotPool], forecast: Forecast | None, left: list[str]):
        self._members, self._pools, self._forecast = members, pools, forecast
        self._number = {id(member.experts): i for i, member in enumerate(members)}
        self.left = left
        self._lock = threading.Lock()
        self._worker = ThreadPoolExecutor(1, "prefetch")
        for member in members:
            member.experts.cache = self

    # ---- public methods

    @classmethod
    def of(cls, model: nn.Module) -> OffloadedExperts | None:
        """Return what ``offload_experts`` returned for a model; None if its experts are not offloaded."""
        caches = (module.cache for module in model.modules() if isinstance(module, Experts))
        return next((cache for cache in caches if isinstance(cache, cls)), None)

    @property
    def statistics(self) -> OffloadStatistics:
        """The counters of all modules together."""
        return sum((member.statistics for member in self._members), OffloadStatistics())

    def by_module(self) -> dict[str, OffloadStatistics]:
        """Return the counters of each module of experts, by its name in the model."""
        return {member.name: replace(member.statistics) for member in self._members}

    def reset_statistics(self) -> None:
        """Count from zero. The slots stay as they are."""
        for member in self._members:
            member.statistics = OffloadStatistics()

    @property
    def num_experts(self) -> int:
        """The number of offloaded experts."""
        return sum(pool.num_experts for pool in self._pools)

    @property
    def num_slots(self) -> int:
        """The number of experts that are on the device at once, at most."""
        return sum(pool.count for pool in self._pools)

    @property
    def slot_bytes(self) -> int:
        """The bytes of the slots on the device."""
        return sum(pool.count * pool.bytes_per_expert for pool in self._pools)

    def __repr__(self) -> str:
        s = self.statistics
        return f"OffloadedExperts({self.num_slots} of {self.num_experts} experts in slots, hit rate {s.hit_rate:.3f})"

    # ---- what ``Experts`` asks

    def compute(self, experts: Experts, x: Any, way: str, args: tuple[Any, ...]) -> Any:
        """Compute as the experts would; see ``Experts.forward``.

        Raises:
            ValueError: the experts are trained, a gradient would be wanted, a way that takes all experts at once, a
                file that was changed under the cache, or tensors that were replaced or, with a file, changed.
        """
        member = self._members[self._number[id(experts)]]
        tokens = x.x if isinstance(x, Rows) else x
        if experts.training:
            raise ValueError("offloaded experts do not train: call model.eval(), or train the model before it offloads")
        if torch.is_grad_enabled() and tokens.requires_grad:
            raise ValueError("offloaded experts have no gradients: call the model under torch.inference_mode()")
        if tokens.device != member.pool.device:
            raise ValueError(f"x is on {tokens.device}, the slots of offloaded experts on {member.pool.device}")
        member.inner.backend = experts.backend
        if CHILD in experts._modules:
            getattr(member.inner, CHILD).active = getattr(experts, CHILD).active
        with self._lock, torch.no_grad():
            member.renew(self._number[id(experts)])
            if isinstance(x, Rows):
                return self._rows(member, x, way)
            if way == "picked":
                return self._picked(member, x, *args)
            raise ValueError(f"offloaded experts compute rows and picked experts, and not {way!r}, which takes all")

    def check(self, experts: Experts) -> None:
        """Raise a ``ValueError`` if the store of some experts was changed."""
        self._members[self._number[id(experts)]].store.check()

    def apply(self, experts: Experts, fn: Callable[[Tensor], Tensor]) -> None:
        """Move the slots as ``fn`` of ``nn.Module._apply`` moves tensors; the store stays.

        Raises:
            ValueError: ``fn`` changes the dtype.
        """
        member = self._members[self._number[id(experts)]]
        of_slots = {id(t) for t in stacked(experts).values()}
        for t in (*experts.parameters(), *experts.buffers()):
            if id(t) not in of_slots:  # what all experts share
                t.data = fn(t.data)
        for rows in member.pool.tensors.values():
            probe = fn(rows.data[:0])
            if probe.dtype != rows.dtype:
                raise ValueError(f"offloaded experts stay {rows.dtype}: convert the model before it is offloaded")
            with self._lock:
                member.pool.move(probe.device)

    # ---- the ways

    def _rows(self, member: Offloaded, rows: Rows, way: str) -> Rows:
        """Return the rows computed, each by itself: gates and sums are the layer's."""
        ends: list[int] = rows.offsets_E.tolist()
        sizes = {e: end - start for e, (start, end) in enumerate(pairwise((0, *ends))) if end > start}
        whole, count = rows.materialized(), member.pool.count
        if not sizes:
            none = replace(whole, offsets_E=rows.offsets_E.new_zeros(count), plan=None)
            return rows.with_output(member.inner(none, way).x)
        number = self._number[id(member.experts)]
        # Those that are there come first: the others would take their slots.
        active = sorted(sizes, key=lambda e: len(sizes) > count and Expert(number, e) not in member.pool.resident)
        own = _Pieces(whole, sizes)
        for first in range(0, len(active), count):
            chunk = active[first : first + count]
            slots = dict(zip(chunk, member.pool.require(number, chunk, member.statistics), strict=True))
            if chunk[-1] == active[-1]:
                self._look_ahead(number, rows.x, [*sizes], chunk)
            by_slot = sorted(chunk, key=slots.__getitem__)
            load = [0] * count
            for e in chunk:
                load[slots[e]] = sizes[e]
            own.put(by_slot, member.inner(own.take(by_slot, load), way).x)
        if rows.gathered:
            return rows.with_output(own.result())
        return rows.with_output(own.summed(), weighted=True, combined=True)

    def _picked(self, member: Offloaded, x: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """Return as ``NeuronExperts.compute_picked`` does; tokens are split if they pick more experts than fit."""
        E, count = member.experts.num_experts, member.pool.count
        picked = [e for e in ids_TK.unique().tolist() if e < E]
        if len(picked) > count:
            T = x.shape[0]
            if T == 1:
                raise ValueError(f"a token picks {len(picked)} experts, and the budget holds {count}")
            halves = zip(*(t.split((T // 2, T - T // 2)) for t in (x, ids_TK, gates_TK)), strict=True)
            return torch.cat([self._picked(member, *half) for half in halves])
        slots = member.pool.require(self._number[id(member.experts)], picked, member.statistics)
        slot_of_E = ids_TK.new_full((E + 1,), count)
        slot_of_E[picked] = torch.tensor(slots, dtype=ids_TK.dtype, device=ids_TK.device)
        y_TD: Tensor = member.inner(x, "picked", slot_of_E[ids_TK], gates_TK)
        return y_TD

    def _look_ahead(self, number: int, x_TD: Tensor, active: list[int], kept: list[int]) -> None:
        """Prefetch the experts that the next module will need while this one computes.

        Args:
            number: this module's.
            x_TD: (T, D), its input.
            active: the experts that it needed.
            kept: the experts that it computes with at the moment.
        """
        if self._forecast is None:
            return
        self._forecast.note(number, active)
        if all(len(pool.resident) == pool.num_experts for pool in self._pools):
            return
        foreseen = self._forecast.next(x_TD)
        if foreseen is None:
            return
        following, best = foreseen
        pool = self._members[following].pool
        wanted = [Expert(following, e) for e in best[: max(pool.count // 2, 1)]]
        keeping = [Expert(number, e) for e in kept]
        pool.prefetch(wanted, keeping, self._worker, self._members[following].statistics)


def stacked(experts: Experts) -> dict[str, Tensor]:
    """Return the stacked tensors of experts by the names of ``weights_of``."""
    tensors: Mapping[str, Tensor] = {**dict(experts.named_parameters()), **dict(experts.named_buffers())}
    return {name: tensors[name] for name in (experts.weights_of(0) if experts.num_local_experts else ())}


class _Pieces:
    """The rows of a call by expert, which go out in the order of the slots and come back in their own.

    Args:
        rows: gathered rows.
        sizes: the number of rows of each expert that has some, in the order of the rows.
    """

    def __init__(self, rows: Rows, sizes: dict[int, int]) -> None:
        self.rows, self.sizes, self.live = rows, sizes, sum(sizes.values())
        self.order = [*sizes]
        self._x, self._index = rows.x[: self.live], rows.row_index_R[: self.live]
        self._y: dict[int, Tensor] = {}
        self._whole: Tensor | None = None

    def take(self, experts: list[int], load: list[int]) -> Rows:
        """Return the rows of some experts one after the other, with gates of 1.

        Args:
            experts: their numbers, in the order of their slots.
            load: the number of rows of each slot.
        """
        x_rD, index_r, device = self._x, self._index, self._x.device
        if experts != self.order:
            x_rD, index_r = self._picked(x_rD, experts), self._picked(index_r, experts)
        return replace(
            self.rows,
            x=x_rD,
            row_index_R=index_r,
            offsets_E=torch.tensor([*accumulate(load)], dtype=torch.int32, device=device),
            gates_R=torch.ones(len(index_r), dtype=self.rows.gates_R.dtype, device=device),
            plan=None,
        )

    def _picked(self, t: Tensor, experts: list[int]) -> Tensor:
        parts = dict(zip(self.order, t.split([*self.sizes.values()]), strict=True))
        return torch.cat([parts[e] for e in experts])

    def put(self, experts: list[int], y_rD: Tensor) -> None:
        """Keep the output of rows that ``take`` returned."""
        if experts == self.order:
            self._whole = y_rD
        else:
            self._y |= zip(experts, y_rD.split([self.sizes[e] for e in experts]), strict=True)

    def result(self) -> Tensor:
        """Return the output of all rows, (R, D_out) in their order; zero for rows that no expert computes."""
        y_rD, lacking = self._joined(), self.rows.x.shape[0] - self.live
        return y_rD if lacking == 0 else torch.cat((y_rD, y_rD.new_zeros(lacking, y_rD.shape[1])))

    def summed(self) -> Tensor:
        """Return the sum of each token's rows, weighted by their gates: (T, D_out)."""
        y_rD = self._joined()
        sum_dtype = accumulate_dtype(y_rD.dtype)
        weighted_rD = y_rD.to(sum_dtype) * self.rows.gates_R[: self.live, None]
        y_TD = weighted_rD.new_zeros(self.rows.num_tokens, y_rD.shape[1])
        return y_TD.index_add_(0, self._index, weighted_rD).to(y_rD.dtype)

    def _joined(self) -> Tensor:
        return torch.cat([self._y[e] for e in self.order]) if self._whole is None else self._whole
