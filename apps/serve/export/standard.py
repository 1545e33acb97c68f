"""The suite's operators, and those that torch's exporter lacks, in ONNX's standard operators."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript import opset18 as op
from onnxscript.values import Op, Opset
from torch import Tensor, nn

import core
from core.dispatch import Dispatcher
from core.experts.ffn import FFNExperts
from core.experts.matrices import QuantizedMatrices
from core.kernels import QuantizedWeight
from core.kernels.quantized import whole_numbers

DOMAIN = "moesaic"
"""Domain of the operators that stand in an ONNX graph for a while, until ``expand`` writes them out."""
MOST_TABLED = 16
"""Experts up to which pairs are ordered by a table of experts and pairs, and not by sorting."""
ByBlocks = Callable[..., Any]
"""Writes ``x w + b`` with a quantized matrix by one operator. It gets a writer, the name of w, x, w as the
``QuantizedWeight`` of one expert, and b if there is one; it returns None if the operator does not take w."""


def translations() -> dict[Any, Callable[..., Any]]:
    """Return ONNX forms of operators that torch has none for, for ``torch.onnx.export``."""

    def operator_of(name: str, *inputs: str) -> Op:
        kinds = {"T": ["tensor(float)", "tensor(double)", "tensor(float16)", "tensor(bfloat16)"]}
        kinds |= {"Q": ["tensor(int8)", "tensor(uint8)"], "I": ["tensor(int32)"]}
        schema = OpSchema(
            name,
            DOMAIN,
            1,
            inputs=[OpSchema.FormalParameter(f"input_{i}", kind) for i, kind in enumerate(inputs)],
            outputs=[OpSchema.FormalParameter("y", "T")],
            type_constraints=[(kind, kinds[kind], "") for kind in dict.fromkeys(inputs)],
        )
        return Op(Opset(DOMAIN, 1), name, schema)

    grouped, quantized = operator_of("GroupedMatMul", "T", "T", "I"), operator_of("QuantizedMatMul", "T", "Q", "T", "I")

    def by_expert(x_R: Any, w: Any, offsets_E: Any) -> Any:
        return grouped(x_R, w, offsets_E)

    def by_quantized(x_R: Any, values: Any, scales: Any, fan_in: int, offsets_E: Any) -> Any:
        return quantized(x_R, values, scales, offsets_E)

    def bucketize(self: Any, boundaries: Any, out_int32: bool = False, right: bool = False) -> Any:
        last = op.Constant(value_ints=[-1])
        values = op.Unsqueeze(self, last)
        boundaries = op.CastLike(boundaries, values)
        passed = op.GreaterOrEqual(values, boundaries) if right else op.Greater(values, boundaries)
        return op.ReduceSum(op.Cast(passed, to=6 if out_int32 else 7), last, keepdims=False)

    def floordiv(self: Any, other: Any) -> Any:
        # ONNX divides integers toward zero, which is too high for a quotient below it.
        quotient = op.Div(self, other)
        rest = op.Sub(self, op.Mul(quotient, other))
        zero = op.CastLike(op.Constant(value_int=0), rest)
        is_high = op.And(op.Not(op.Equal(rest, zero)), op.Xor(op.Less(rest, zero), op.Less(other, zero)))
        return op.Sub(quotient, op.CastLike(is_high, quotient))

    def remainder(self: Any, other: Any) -> Any:
        # For a size, which torch's own form takes for a known number.
        other = op.CastLike(other, self)
        if self.dtype.is_integer():
            return op.Mod(self, other)
        return op.Sub(self, op.Mul(op.Floor(op.Div(self, other)), other))

    def rshift(self: Any, other: int) -> Any:
        # torch's own form is one of signed numbers, which gives bytes another type.
        if self.dtype.is_signed():
            return floordiv(self, op.CastLike(op.Constant(value_int=2**other), self))
        return op.BitShift(self, op.CastLike(op.Constant(value_int=other), self), direction="RIGHT")

    def sort(self: Any, dim: int = -1, descending: bool = False, stable: bool = True) -> Any:
        # TopK takes the lower place of equal values first, which is what stable means.
        axis = op.Constant(value_ints=[dim])
        return op.TopK(self, op.Gather(op.Shape(self), axis), axis=dim, largest=descending, sorted=True)

    def index_add(self: Any, dim: int, index: Any, source: Any, alpha: float = 1) -> Any:
        return op.ScatterND(self, rows("index_add", dim, index), source, reduction="add")

    def index_copy(self: Any, dim: int, index: Any, source: Any) -> Any:
        return op.ScatterND(self, rows("index_copy", dim, index), source)

    def rows(name: str, dim: int, index: Any) -> Any:
        if dim != 0:
            raise NotImplementedError(f"{name} has an ONNX form along axis 0 alone, not {dim}")
        return op.Unsqueeze(index, op.Constant(value_ints=[-1]))

    return {
        torch.ops.moesaic.grouped_mm.default: by_expert,
        torch.ops.moesaic.quantized_mm.default: by_quantized,
        operator.floordiv: floordiv,
        torch.ops.aten.__rshift__.Scalar: rshift,
        torch.ops.aten.bucketize.Tensor: bucketize,
        torch.ops.aten.remainder.Scalar: remainder,
        torch.ops.aten.sort.stable: sort,
        torch.ops.aten.index_add.default: index_add,
        torch.ops.aten.index_copy.default: index_copy,
    }


@dataclass(frozen=True)
class _Pairs:
    """The dispatcher's own notes: the pairs as they are in the routing."""

    token_index_N: Tensor
    expert_ids_N: Tensor
    gates_N: Tensor


class _AllPairs(Dispatcher):
    """A dispatcher that leaves sorting and summing to the operator of the experts."""

    def dispatch(self, x: Tensor, routing: Any) -> core.Rows:
        pairs = _Pairs(routing.token_index_N, routing.expert_ids_N, routing.gates_N)
        counts_E = routing.tokens_per_expert_E
        return core.Rows(x, pairs.token_index_N, counts_E, pairs.gates_N, routing.num_tokens, plan=pairs)

    def combine(self, rows: core.Rows) -> Tensor:
        return rows.x


class _Chain(nn.Module):
    """Feed-forward experts as one operator, which ``expand`` writes out: each expert's matmuls in a chain.

    So a chain's numbers stay in cache, and the matrices and biases of an expert are initializers of their own.
    """

    def __init__(self, experts: FFNExperts) -> None:
        super().__init__()
        self.num_experts, self.reads_context, self.activation = experts.num_experts, False, experts.activation
        self.w_in, self.w_out, self.w_gate = experts.w_in, experts.w_out, experts.w_gate
        self.b_in, self.b_out = experts.b_in, experts.b_out

    def forward(self, rows: core.Rows) -> core.Rows:
        pairs, matrices = rows.plan, (self.w_in, self.w_out, self.w_gate)
        quantized = [w if isinstance(w, QuantizedMatrices) else None for w in matrices]
        y_TD = torch.onnx.ops.symbolic(
            f"{DOMAIN}::Experts",
            (
                rows.x,
                pairs.token_index_N,
                pairs.expert_ids_N,
                pairs.gates_N.to(rows.x.dtype),
                rows.offsets_E,
                self.b_in,
                self.b_out,
                *(w if q is None else q.values for w, q in zip(matrices, quantized, strict=True)),
                *(None if q is None else q.scales for q in quantized),
            ),
            {"activation": self.activation},
            dtype=rows.x.dtype,
            shape=(rows.x.shape[0], self.w_out.shape[-1]),
            version=1,
        )
        return rows.with_output(y_TD, combined=True)


def chain_of(layer: core.MoE) -> tuple[nn.Module, Dispatcher] | None:
    """Return the parts that make a layer one operator of this module; None if its experts have another kind."""
    if type(layer.experts) is not FFNExperts or layer.router.gates_on == "input":
        return None
    return _Chain(layer.experts), _AllPairs()


def expand(model: Any, by_blocks: ByBlocks | None = None) -> None:
    """Write out the operators of this module in an ONNX graph.

    An expert's matrix is an initializer of its own: onnxruntime packs it once, when the file is loaded. One that is cut
    out of a stacked tensor in each call would be copied.

    Args:
        model: the graph.
        by_blocks: writes a matmul with a quantized matrix as one operator; None: it is dequantized before.
    """
    graph = model.graph
    writers = {"GroupedMatMul": _Products, "QuantizedMatMul": _Products, "Experts": _Chains}
    cut: dict[tuple[str, int], Any] = {}
    for node in list(graph):
        if node.domain == DOMAIN:
            writers[node.op_type](graph, node, cut, by_blocks).write()
    _shorten_sorts(graph)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            graph.initializers.pop(name)
    model.opset_imports.pop(DOMAIN, None)


def _shorten_sorts(graph: Any) -> None:
    """Let a sort of which only the first k places are read look for k values: the choice of experts."""
    for node in list(graph):
        if node.op_type != "TopK" or node.outputs[0].uses():
            continue
        readers = [use.node for use in node.outputs[1].uses()]
        axis, rank = node.attributes["axis"].as_int(), len(node.inputs[0].shape)
        first = {_first_of(reader, axis % rank, rank) for reader in readers}
        if len(first) == 1 and None not in first:
            k = readers[0].inputs[2]
            graph.sort()  # the node that gives k may come after the sort
            node.replace_input_with(1, k)
            for value, like in zip(node.outputs, (None, readers[0].outputs[0]), strict=True):
                value.shape = None if like is None else like.shape
            for reader in readers:
                reader.outputs[0].replace_all_uses_with(node.outputs[1], replace_graph_outputs=True)
                graph.remove(reader, safe=True)


def _first_of(reader: Any, axis: int, rank: int) -> int | None:
    """Return k where a node is a slice of the first k places of an axis, by constants; else None."""
    if reader.op_type != "Slice":
        return None
    values = [None if v is None or v.const_value is None else v.const_value.numpy().tolist() for v in reader.inputs[1:]]
    match [*values, [1]]:
        case [[0], [int(k)], [int(along)], [1], *_] if along % rank == axis and k > 0:
            return k
    return None


class Writer:
    """Puts nodes in the place of one node.

    Args:
        graph: the ONNX graph.
        node: the node.
        cut: the experts' tensors that are initializers already, by the stacked tensor's name and the expert's number.
        by_blocks: as in ``expand``.
    """

    def __init__(
        self, graph: Any, node: Any, cut: dict[tuple[str, int], Any], by_blocks: ByBlocks | None = None
    ) -> None:
        self.graph, self.node, self.cut, self.by_blocks = graph, node, cut, by_blocks
        self.nodes: list[Any] = []

    def write(self) -> None:
        """Replace the node."""
        y, old = self.output(), self.node.outputs[0]
        y.name, y.shape, y.type = old.name, old.shape, old.type
        self.graph.insert_before(self.node, self.nodes)
        old.replace_all_uses_with(y, replace_graph_outputs=True)
        self.graph.remove(self.node, safe=True)

    def output(self) -> Any:
        """Add the nodes and return the last one's output."""
        raise NotImplementedError

    def add(self, operator: str, *inputs: Any, domain: str = "", **attributes: Any) -> Any:
        self.nodes.append(ir.node(operator, inputs, attributes, domain=domain))
        return self.nodes[-1].outputs[0]

    def split(self, x: Any, sizes: Any, count: int) -> Any:
        self.nodes.append(ir.node("Split", [x, sizes], {"axis": 0}, num_outputs=count))
        return self.nodes[-1].outputs

    def ints(self, *values: int) -> Any:
        return self.add("Constant", value=ir.tensor(list(values), dtype=ir.DataType.INT64))

    def cut_out(self, w: Any, e: int) -> Any:
        """Return the part of expert ``e`` of a stacked tensor: an initializer where the tensor is one."""
        if w.const_value is None or not w.is_initializer():
            return self.add("Squeeze", self.add("Slice", w, *map(self.ints, (e, e + 1, 0))), self.ints(0))
        if (w.name, e) not in self.cut:
            name = f"{w.name}.{e}"
            value = ir.val(name, const_value=ir.tensor(w.const_value.numpy()[e], name=name))
            self.graph.register_initializer(value)
            self.cut[w.name, e] = value
        return self.cut[w.name, e]

    def linear(self, e: int, x: Any, w: Any, scales: Any, fan_in: int, b: Any = None) -> Any:
        """Return ``x w_e + b_e``.

        Args:
            e: number of the expert.
            x: (rows, K).
            w: the stacked matrices (E, K, N), or the values of quantized ones.
            scales: of quantized matrices; None: they are not.
            fan_in: K.
            b: (E, N), or None.
        """
        bias = () if b is None else (self.cut_out(b, e),)
        if scales is None:
            return self.add("Gemm" if bias else "MatMul", x, self.cut_out(w, e), *bias)
        numbers = [torch.from_numpy(t.const_value.numpy()[e : e + 1].copy()) for t in (w, scales)]
        weight = QuantizedWeight(numbers[0], numbers[1], fan_in, numbers[1].dtype)
        name = f"{w.name}.{e}"
        y = None if self.by_blocks is None else self.by_blocks(self, name, x, weight, *bias)
        return self.add("Gemm" if bias else "MatMul", x, self._dequantized(name, weight), *bias) if y is None else y

    def _dequantized(self, name: str, weight: QuantizedWeight) -> Any:
        """Return a matrix (K, N) whose values and scales are in the file, and which onnxruntime dequantizes."""
        q = whole_numbers(weight.values, weight.fan_in).numpy()
        values = self.constant(name, q if weight.bits == 8 else q.astype(ml_dtypes.int4))
        # One scale a channel is one block too: along the last axis onnxruntime 1.32 takes up to 10 times as long.
        scales = self.constant(f"{name}.scales", weight.scales)
        w = self.add("DequantizeLinear", values, scales, axis=1, block_size=weight.group_size)
        # The first axis keeps onnxruntime from a product of its own, which rounds the tokens to 8 bits: 1 % off.
        return self.add("Squeeze", w, self.ints(0))

    def constant(self, name: str, value: Any) -> Any:
        """Return an initializer, the one of this name if there is one."""
        if name not in self.graph.initializers:
            array = value.numpy() if isinstance(value, Tensor) else value
            self.graph.register_initializer(ir.val(name, const_value=ir.tensor(array, name=name)))
        return self.graph.initializers[name]


class _Products(Writer):
    """Writes out ``moesaic::grouped_mm`` of x (R, D), w (E, D, F) and offsets (E,), or ``moesaic::quantized_mm``."""

    def output(self) -> Any:
        x, w, *scales, offsets = self.node.inputs
        scales = scales[0] if scales else None
        E, F = w.shape[0], w.shape[-1]
        ends = self.add("Cast", offsets, to=ir.DataType.INT64)
        ends = self.add("Concat", ends, self.add("Shape", x, start=0, end=1), axis=0)
        starts = self.add("Concat", self.ints(0), self.add("Slice", ends, *map(self.ints, (0, -1, 0))), axis=0)
        # The rows after the last expert are rows that no expert computes.
        *parts, rest = self.split(x, self.add("Sub", ends, starts), E + 1)
        products = [self.linear(e, part, w, scales, x.shape[-1]) for e, part in enumerate(parts)]
        shape = self.add("Concat", self.add("Shape", rest, start=0, end=1), self.ints(F), axis=0)
        zeros = self.add("ConstantOfShape", shape, value=ir.tensor([0.0], dtype=x.dtype))
        return self.add("Concat", *products, zeros, axis=0)


class _Chains(Writer):
    """Writes out the experts of a layer: sort the pairs, run each expert on its rows, and add them to their tokens."""

    def output(self) -> Any:
        x, token_index, expert_ids, gates, counts, *weights = self.node.inputs
        b_in, b_out, w_in, w_out, w_gate, s_in, s_out, s_gate = weights + [None] * (8 - len(weights))
        D, F, E = x.shape[-1], w_in.shape[-1], w_in.shape[0]
        order = self._order(expert_ids, E)
        tokens, gates = self.add("Gather", token_index, order), self.add("Gather", gates, order)
        last = self.ints(-1)
        rows = self.split(self.add("Gather", x, tokens), counts, E)
        gates = self.split(self.add("Unsqueeze", gates, last), counts, E)
        parts = []
        for e, x_e in enumerate(rows):  # gate * f_e(x)
            h = self.linear(e, x_e, w_in, s_in, D, b_in)
            if w_gate is None:
                h = self._activation(h)
            else:
                h = self.add("Mul", self._activation(self.linear(e, x_e, w_gate, s_gate, D)), h)
            parts.append(self.add("Mul", self.linear(e, h, w_out, s_out, F, b_out), gates[e]))
        shape = self.add("Concat", self.add("Shape", x, start=0, end=1), self.ints(w_out.shape[-1]), axis=0)
        zeros = self.add("ConstantOfShape", shape, value=ir.tensor([0.0], dtype=x.dtype))
        places, y = self.add("Unsqueeze", tokens, last), self.add("Concat", *parts, axis=0)
        return self.add("ScatterND", zeros, places, y, reduction="add")

    def _order(self, expert_ids: Any, E: int) -> Any:
        """Return the computed pairs by expert, earlier ones first.

        For few experts the places of a table of experts and pairs are that order; this is 2 times as fast as sorting
        with 8 experts, and as fast with 16 (12,544 pairs, onnxruntime 1.32).
        """
        if E <= MOST_TABLED:
            column = self.add("Constant", value=ir.tensor([[e] for e in range(E)], dtype=ir.DataType.INT64))
            places = self.add("NonZero", self.add("Equal", column, expert_ids))
            return self.add("Squeeze", self.add("Slice", places, *map(self.ints, (1, 2, 0))), self.ints(0))
        self.nodes.append(
            ir.node("TopK", [expert_ids, self.add("Shape", expert_ids)], {"largest": 0, "axis": 0}, num_outputs=2)
        )
        order = self.nodes[-1].outputs[1]
        computed = self.add("Cast", self.add("Less", expert_ids, self.ints(E)), to=ir.DataType.INT64)
        return self.add("Slice", order, self.ints(0), self.add("ReduceSum", computed, self.ints(0)), self.ints(0))

    def _activation(self, h: Any) -> Any:
        name = self.node.attributes["activation"].as_string()
        if name == "silu":
            return self.add("Mul", h, self.add("Sigmoid", h))
        if name == "relu":
            return self.add("Relu", h)
        return self.add("Gelu", h, approximate="tanh" if name == "gelu_tanh" else "none")
