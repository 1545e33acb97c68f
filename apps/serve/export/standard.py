"""The suite's operators, and those that torch's exporter lacks, in ONNX's standard operators."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

DOMAIN = "moesaic"
"""Domain of the operators that stand in an ONNX graph for a while, until ``expand`` writes them out."""


def translations() -> dict[Any, Callable[..., Any]]:
    """Return ONNX forms of operators that torch has none for, for ``torch.onnx.export``."""
    from onnx.defs import OpSchema
    from onnxscript import opset18 as op
    from onnxscript.values import Op, Opset

    inputs = [OpSchema.FormalParameter(name, "T") for name in ("x", "w")]
    schema = OpSchema(
        "GroupedMatMul",
        DOMAIN,
        1,
        inputs=[*inputs, OpSchema.FormalParameter("offsets", "tensor(int32)")],
        outputs=[OpSchema.FormalParameter("y", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(double)", "tensor(float16)", "tensor(bfloat16)"], "")],
    )
    grouped = Op(Opset(DOMAIN, 1), "GroupedMatMul", schema)

    def by_expert(x_R: Any, w: Any, offsets_E: Any) -> Any:
        return grouped(x_R, w, offsets_E)

    def bucketize(self: Any, boundaries: Any, out_int32: bool = False, right: bool = False) -> Any:
        last = op.Constant(value_ints=[-1])
        values = op.Unsqueeze(self, last)
        boundaries = op.CastLike(boundaries, values)
        passed = op.GreaterOrEqual(values, boundaries) if right else op.Greater(values, boundaries)
        return op.ReduceSum(op.Cast(passed, to=6 if out_int32 else 7), last, keepdims=False)

    def floordiv(self: Any, other: Any) -> Any:
        # ONNX divides whole numbers towards zero, which is too high for a quotient below it.
        quotient = op.Div(self, other)
        rest = op.Sub(self, op.Mul(quotient, other))
        zero = op.CastLike(op.Constant(value_int=0), rest)
        is_high = op.And(op.Not(op.Equal(rest, zero)), op.Xor(op.Less(rest, zero), op.Less(other, zero)))
        return op.Sub(quotient, op.CastLike(is_high, quotient))

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
        operator.floordiv: floordiv,
        torch.ops.aten.bucketize.Tensor: bucketize,
        torch.ops.aten.sort.stable: sort,
        torch.ops.aten.index_add.default: index_add,
        torch.ops.aten.index_copy.default: index_copy,
    }


def expand(model: Any) -> None:
    """Write out the products by expert in an ONNX graph: each expert's rows by its matrix, an initializer of its own.

    A matrix that is an initializer is stored in its packed form by onnxruntime, once; one that is cut out of a stacked
    tensor in each call would be copied.
    """
    graph, cut = model.graph, dict[tuple[str, int], Any]()
    for node in list(graph):
        if (node.domain, node.op_type) == (DOMAIN, "GroupedMatMul"):
            _Products(graph, node, cut).write()
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            graph.initializers.pop(name)
    model.opset_imports.pop(DOMAIN, None)


class _Products:
    """The nodes that take the place of one product by expert.

    Args:
        graph: the ONNX graph.
        node: the product, of x (R, D), w (E, D, F) and offsets (E,).
        cut: the experts' matrices that are initializers already, by the tensor's name and the expert's number.
    """

    def __init__(self, graph: Any, node: Any, cut: dict[tuple[str, int], Any]) -> None:
        self.graph, self.node, self.cut = graph, node, cut
        self.nodes: list[Any] = []

    def write(self) -> None:
        import onnx_ir as ir

        x, w, offsets = self.node.inputs
        E, F = w.shape[0], w.shape[-1]
        ends = self._add("Cast", offsets, to=ir.DataType.INT64)
        ends = self._add("Concat", ends, self._add("Shape", x, start=0, end=1), axis=0)
        starts = self._add("Concat", self._ints(0), self._add("Slice", ends, *map(self._ints, (0, -1, 0))), axis=0)
        # What is left past the last expert are rows that no expert computes.
        *parts, rest = self._split(x, self._add("Sub", ends, starts), E + 1)
        products = [self._add("MatMul", part, self._expert(w, e)) for e, part in enumerate(parts)]
        shape = self._add("Concat", self._add("Shape", rest, start=0, end=1), self._ints(F), axis=0)
        zeros = self._add("ConstantOfShape", shape, value=ir.tensor([0.0], dtype=x.dtype))
        y, old = self._add("Concat", *products, zeros, axis=0), self.node.outputs[0]
        y.name, y.shape, y.type = old.name, old.shape, old.type
        self.graph.insert_before(self.node, self.nodes)
        old.replace_all_uses_with(y)
        self.graph.remove(self.node, safe=True)

    def _add(self, operator: str, *inputs: Any, **attributes: Any) -> Any:
        import onnx_ir as ir

        self.nodes.append(ir.node(operator, inputs, attributes))
        return self.nodes[-1].outputs[0]

    def _split(self, x: Any, sizes: Any, count: int) -> Any:
        import onnx_ir as ir

        self.nodes.append(ir.node("Split", [x, sizes], {"axis": 0}, num_outputs=count))
        return self.nodes[-1].outputs

    def _ints(self, *values: int) -> Any:
        import onnx_ir as ir

        return self._add("Constant", value=ir.tensor(list(values), dtype=ir.DataType.INT64))

    def _expert(self, w: Any, e: int) -> Any:
        """Return the matrix of expert ``e`` of a stacked tensor: an initializer where the tensor is one."""
        import onnx_ir as ir

        if w.const_value is None or not w.is_initializer():
            return self._add("Squeeze", self._add("Slice", w, *map(self._ints, (e, e + 1, 0))), self._ints(0))
        if (w.name, e) not in self.cut:
            name = f"{w.name}.{e}"
            value = ir.val(name, const_value=ir.tensor(w.const_value.numpy()[e], name=name))
            self.graph.register_initializer(value)
            self.cut[w.name, e] = value
        return self.cut[w.name, e]
