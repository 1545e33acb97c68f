"""Classes of an adopted block, its router and its experts, which are put before their own classes.

Nothing of the block is copied or renamed: its modules change class, and back again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..contract import Evidence, Routing, RoutingContext
from ..experts import Experts
from ..experts.adapters import CHILD, adapted, updates_of
from ..experts.base import local_tensor
from ..experts.clamped import ClampedSwiGLUExperts
from ..experts.ffn import FFNExperts
from ..experts.matrices import QuantizedMatrices
from ..kernels import SCORE_FUNCS, QuantizedWeight, count_experts
from ..layers import MoE
from ..routing.balance.balance import expert_bias_step
from ..routing.balance.terms import CHOICE_TERMS, SCORE_TERMS
from ..routing.router import Router
from .layouts import Layout
from .shrink import Rows, set_top_k, shrinking

_MATRICES = ("w_in", "w_gate", "w_out")


@dataclass(eq=False)
class Call:
    """What the parts of an adopted block tell each other in a call, since the block calls them in its own way.

    Attributes:
        block: the block.
        context: padding of the call, which hooks on the modules around tell; None: there is none.
        leading: shape of the block's input without its last axis.
        logits_TE: the router's logits, until the block's decision takes them.
    """

    block: Any
    context: RoutingContext | None = None
    leading: tuple[int, ...] = ()
    logits_TE: Tensor | None = None

    @property
    def valid_T(self) -> Tensor | None:
        """False for the padding of this call; None: there is none."""
        # With a cache the mask has the tokens before, too.
        if self.context is None or len(self.leading) < 2:
            return None
        assert self.context.valid_BS is not None
        return self.context.valid_BS[:, -self.leading[1] :].reshape(-1)


class Adopted:
    """Common base of the three.

    Attributes:
        original: the class that the module had.
        layout: layout of its block.
        call: of the block; its three parts hold the same one.
    """

    original: ClassVar[type[nn.Module]]
    layout: ClassVar[Layout]
    call: Call


class AdoptedRouter(Adopted, Router):
    """A router that decides as before, and records its logits."""

    terms = SCORE_TERMS | CHOICE_TERMS | {"router_z_loss"}
    config = None
    num_groups: int
    bias_update_rate: float

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.original.forward(self, *args, **kwargs)
        self.call.logits_TE = out if self.layout.logits is None else out[self.layout.logits]
        return out

    def reset_parameters(self) -> None:
        """Adopted routers have weights to keep."""

    @property
    def expert_bias(self) -> Tensor | None:  # type: ignore[override]
        """The tensor that is added to the scores for the choice, (E,) or (1, E)."""
        try:
            bias: Tensor | None = attrgetter(self.layout.bias)(self.call.block) if self.layout.bias else None
        except AttributeError:
            return None  # the model's options leave it out
        return bias

    @torch.no_grad()
    def update_expert_bias(self, chosen_per_expert_E: Tensor) -> None:
        bias, rate = self.expert_bias, self.bias_update_rate
        if bias is not None and rate:
            bias += expert_bias_step(chosen_per_expert_E, rate).view_as(bias)


class _Together(torch.autograd.Function):
    """Parameters that are views of one tensor, as that tensor: nothing is copied."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, *parts: Tensor) -> Tensor:
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *grads[0].unbind(0)


class AdoptedExperts(Adopted, Experts):
    """Experts that a block calls with its tokens and its choice, and the engine with rows."""

    storage: dict[str, Tensor]
    """The stacked parameters of one module an expert, by path."""
    hidden_axes = MappingProxyType({})
    linear_in = frozenset()

    def __call__(self, x: Any, way: Any = "rows", *args: Any, **kwargs: Any) -> Any:
        if isinstance(way, Tensor):
            return self.call.block.compute_chosen(x, way, *args, **kwargs)
        return super().__call__(x, way, *args, **kwargs)

    @property
    def valid_T(self) -> Tensor | None:
        """False for the padding that the block computes in this call; None: there is none."""
        return self.call.valid_T

    def stacked(self, path: str) -> Tensor:
        """Return a parameter whose first axis counts the experts."""
        if self.layout.way in ("mask", "gates"):
            return self._stacked_modules(path)
        tensor: Tensor = local_tensor(attrgetter(path)(self if self.layout.experts else self.call.block))
        return tensor.unflatten(0, (self.num_experts, -1)) if self.layout.flat else tensor

    def _stacked_modules(self, path: str) -> Tensor:
        """Return the parameters of one module an expert as one tensor, of which they are views from then on."""
        parts = [attrgetter(path)(expert) for expert in self.one_each()]
        whole: Tensor | None = self.storage.get(path)
        if whole is None or any(p.data_ptr() != own.data_ptr() for p, own in zip(parts, whole, strict=True)):
            whole = torch.stack([part.detach() for part in parts])
            for part, own in zip(parts, whole, strict=True):
                part.data = own
            self.storage[path] = whole
        together: Tensor = _Together.apply(whole, *parts)
        return together

    @property
    def is_stacked(self) -> bool:
        layout = self.layout
        if self.is_quantized:  # the matrices are stacked then, and biases of one module each are not
            return not (layout.up_bias and self.one_each())
        return bool(layout.experts) and not layout.flat and not self.one_each()

    def weights_of(self, e: int) -> dict[str, Tensor]:
        if self.is_stacked:
            return super().weights_of(e)
        if not 0 <= e < self.num_local_experts:
            raise ValueError(f"expert {e} is not in range(num_local_experts={self.num_local_experts})")
        if self.one_each():
            own: dict[str, Tensor] = dict(self.one_each()[e].named_parameters())
        else:
            paths = filter(None, (self.layout.up, self.layout.gate, self.layout.down))
            own = {path: self.stacked(path)[e] for path in paths}
        added = (*self.named_parameters(), *self.named_buffers())
        return own | {name: t[e] for name, t in added if name.partition(".")[0] in (CHILD, *_MATRICES)}

    def init_each(self, fn: Callable[[Tensor], Any]) -> None:
        if self.is_quantized:
            super().init_each(fn)  # an error
        with torch.no_grad():
            for matrices in self.matrices():
                for matrix in () if matrices is None else matrices:
                    fn(matrix)
            for bias in self.biases():
                bias.zero_()

    def one_each(self) -> list[nn.Module]:
        """Return the modules of the experts, if each has its own."""
        return [m for name, m in self._modules.items() if m is not None and name.startswith("expert_")]

    def halves(self, tensor: Tensor, axis: int) -> tuple[Tensor | None, Tensor]:
        """Return the gate's and the input's half of a tensor that has both, as views."""
        if not self.layout.gated:
            return None, tensor
        if self.layout.interleaved:
            gate, up = tensor.unflatten(axis, (-1, 2)).unbind(axis + 1)
        else:
            gate, up = tensor.chunk(2, axis)
        return gate, up

    def matrices(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return ``w_in``, ``w_gate`` (E, D, F) and ``w_out`` (E, F, D_out), views of the parameters."""
        layout = self.layout
        if self.is_quantized:
            return tuple(self._modules.get(name) for name in _MATRICES)  # type: ignore[return-value]
        up, down = self.stacked(layout.up), self.stacked(layout.down)
        gate: Tensor | None
        if layout.gate:
            gate, into = self.stacked(layout.gate), up
        else:
            gate, into = self.halves(up, 2 if layout.transposed else 1)
        if not layout.transposed:
            gate, into = None if gate is None else gate.transpose(1, 2), into.transpose(1, 2)
        return into, gate, down if self._is_transposed(layout.down) else down.transpose(1, 2)

    def _is_transposed(self, path: str) -> bool:
        """Return whether the matrices of a path are (E, in, out)."""
        layout = self.layout
        is_other = path == layout.down and layout.down_transposed is not None
        return bool(layout.down_transposed) if is_other else layout.transposed

    def adapter_shapes(self) -> dict[str, tuple[int, int, int]]:
        layout, (into, gate, out) = self.layout, self.matrices()
        E, D, F = into.shape
        shapes = {layout.up: (E, D, F if gate is None or layout.gate else 2 * F)}
        if layout.gate:
            shapes[layout.gate] = (E, D, F)
        return {**shapes, layout.down: (E, F, out.shape[2])}

    def add_to(self, key: str, update: Tensor) -> None:
        self.stacked(key).add_(update if self._is_transposed(key) else update.transpose(1, 2))

    def quantizable(self) -> dict[str, Tensor]:
        return {name: w for name, w in zip(_MATRICES, self.matrices(), strict=True) if w is not None}

    def put_quantized(self, name: str, weight: QuantizedWeight) -> None:
        self._modules[name] = QuantizedMatrices(weight)
        path = {"w_in": self.layout.up, "w_gate": self.layout.gate, "w_out": self.layout.down}[name]
        if path:
            parent, _, leaf = path.rpartition(".")
            for holder in self.one_each() or [self if self.layout.experts else self.call.block]:
                holder.get_submodule(parent)._parameters[leaf] = None
        for parameter in self._without_adapters():
            parameter.requires_grad_(False)

    def vectors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return ``b_in``, ``b_gate`` (E, F) and ``b_out`` (E, D_out), views of the parameters."""
        layout = self.layout
        if not layout.up_bias:
            return None, None, None
        gate, into = self.halves(self.stacked(layout.up_bias), 1)
        return into, gate, self.stacked(layout.down_bias)

    def reset_parameters(self) -> None:
        """Adopted experts have weights to keep."""

    w_in: Any = property(lambda self: self.matrices()[0])
    w_gate: Any = property(lambda self: self.matrices()[1])
    w_out: Any = property(lambda self: self.matrices()[2])
    b_in: Any = property(lambda self: self.vectors()[0])
    b_gate: Any = property(lambda self: self.vectors()[1])
    b_out: Any = property(lambda self: self.vectors()[2])

    def _weights(self) -> tuple[Tensor | None, ...]:
        layout, (w_in, w_gate, w_out), (b_in, b_gate, b_out) = self.layout, self.matrices(), self.vectors()
        if CHILD in self._modules:
            up = updates_of(self, layout.up)
            if layout.gate:
                gate = updates_of(self, layout.gate)
            else:
                gate = [(a, g, scale) for a, b, scale in up if (g := self.halves(b, 2)[0]) is not None]
                up = [(a, self.halves(b, 2)[1], scale) for a, b, scale in up]
            w_in, w_gate = adapted(w_in, up), adapted(w_gate, gate)
            w_out = adapted(w_out, updates_of(self, layout.down))
        return w_in, b_in, w_gate, b_gate, w_out, b_out

    def biases(self) -> list[Tensor]:
        return [bias for bias in self.vectors() if bias is not None]


class AdoptedFFN(AdoptedExperts, FFNExperts):  # type: ignore[misc]
    """Experts of two or three matrices."""


class AdoptedClamped(AdoptedExperts, ClampedSwiGLUExperts):  # type: ignore[misc]
    """Gated experts whose halves are held within limits."""


class AdoptedMoE(Adopted, MoE):
    """A block that routes as before. The engine's kernels compute its experts, and tapes record it."""

    bias: Tensor
    shared_expert: nn.Module
    is_adopted = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        self.call.leading = x.shape[:-1]
        if self.layout.way == "input":
            return self.forward_of_scores(x)
        if self.layout.way == "sorted":
            return self.forward_of_logits(x)
        return self.original.forward(self, *args, **kwargs)

    def forward_of_logits(self, x: Tensor) -> Tensor:
        """Choose the experts again, from the logits, since the router returns sorted tokens."""
        top_TK, ids_TK = self.router(x.reshape(-1, x.shape[-1]))[self.layout.logits].topk(int(self.pairs_per_token), 1)
        return self.compute_chosen(x, ids_TK, top_TK.softmax(1).type_as(x)) + self.bias

    def forward_of_scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute as the block does, but only the chosen experts."""
        x_TD = x.reshape(-1, x.shape[-1])
        scores_TE, logits_TE = self.router(x_TD)
        ids_TK = logits_TE.topk(int(self.pairs_per_token), -1).indices
        out = self.shared_expert(x_TD)
        return out + self.compute_chosen(x_TD, ids_TK, scores_TE.gather(1, ids_TK)), logits_TE

    def all_expert_params(self) -> int:
        layout = self.layout
        of_block = () if layout.experts or self.experts.is_quantized else (layout.up, layout.gate, layout.down)
        return super().all_expert_params() + sum(attrgetter(path)(self).numel() for path in of_block if path)

    def reset_parameters(self) -> None:
        """Adopted blocks have weights to keep."""

    def shrunk(self, num_experts: int, rows: Rows) -> Callable[[], None]:
        return shrinking(self, num_experts, rows)

    @property
    def can_take_fewer(self) -> bool:
        """Whether tokens take the best ``top_k`` of the scores, not experts of a table or of a method for two."""
        tensors = (*self.router.parameters(), *self.router.buffers())
        return not self.layout.fixed_top_k and all(t.is_floating_point() for t in tensors)

    def take_fewer(self, top_k: int) -> None:
        """Let each token take at most ``top_k`` experts, in place."""
        if self.can_take_fewer and top_k < self.pairs_per_token:
            set_top_k(self, top_k)

    @property
    def router(self) -> Any:  # type: ignore[override]
        return self._modules[self.layout.router]

    def routing(self, expert_ids_TK: Tensor, gates_TK: Tensor) -> Routing:
        """Return the block's choice as the engine's."""
        T, K = expert_ids_TK.shape
        logits_TE, self.call.logits_TE = self.call.logits_TE, None
        evidence, leading = Evidence(), self.call.leading
        if logits_TE is not None and self.keeps_evidence:
            logits_TE = logits_TE.float().reshape(T, -1)
            evidence = Evidence(SCORE_FUNCS[self.layout.score](logits_TE), logits_TE)
        ids_N, E, valid_T = expert_ids_TK.reshape(-1), self.num_experts, self.call.valid_T
        computed_E = count_experts(ids_N, E)
        real_N = None if valid_T is None else valid_T.repeat_interleave(K)
        return Routing(
            token_index_N=torch.arange(T, device=ids_N.device).repeat_interleave(K),
            expert_ids_N=ids_N,
            gates_N=gates_TK.reshape(-1).float(),
            tokens_per_expert_E=computed_E,
            chosen_per_expert_E=computed_E if real_N is None else count_experts(ids_N.masked_fill(~real_N, E), E),
            num_tokens=T,
            top_k=K,
            valid_T=valid_T,
            num_sequences=leading[0] if len(leading) > 1 else 1,
            evidence=evidence,
        )

    def compute_chosen(self, x: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """Return the sum of the chosen experts' outputs of each token, weighted by its gates, in the shape of ``x``."""
        if self.layout.way in ("mask", "gates"):
            expert_ids_TK, gates_TK = self.choice_of_mask(expert_ids_TK, gates_TK)
        routing = self.routing(expert_ids_TK, gates_TK)
        self.record_pass(_without_padding(routing), self.call.context or RoutingContext())
        rows = self.dispatcher.dispatch(x.reshape(-1, x.shape[-1]), routing)
        if self.layout.way == "input":
            rows = rows.weighted_input()
        return self.dispatcher.combine(self.experts(rows)).to(x.dtype).view_as(x)

    def choice_of_mask(self, chosen: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
        """Return expert ids and gates (T, K) of one-hot choices; the id of a pair that is dropped is E."""
        E = self.num_experts
        if self.layout.way == "mask":
            return torch.where(chosen.any(-1), chosen.argmax(-1), E), gates
        gates_TK, ids_TK = gates.topk(min(2, E), -1)
        return torch.where(gates_TK > 0, ids_TK, E), gates_TK


def _without_padding(routing: Routing) -> Routing:
    """Return a decision as tapes have it: padding, which such a block computes too, is not computed."""
    if routing.valid_T is None:
        return routing
    E, is_padding_N = len(routing.tokens_per_expert_E), ~routing.valid_T[routing.token_index_N]
    ids_N, counts_E = routing.expert_ids_N.masked_fill(is_padding_N, E), routing.chosen_per_expert_E
    return replace(routing, expert_ids_N=ids_N, tokens_per_expert_E=counts_E)
