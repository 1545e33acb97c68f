"""Readers: functions that make a ``FeedForwardPart`` of a module, and the modules that have one.

A network of any module that can be called with tokens alone is read by ``read_structure``. The readers here know
blocks that take more, and stacks of layers. No library is imported: such modules are recognized by the names and kinds
of their parts, and ``check_part`` compares numbers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from ...experts import MLP
from ...kernels import ACTIVATIONS
from ...layers import MoELayer
from ...torch_internals import feed_forward
from ..build.sparse_ffn import SparseFFN
from .calls import naming_module
from .feed_forward import (
    FeedForwardPart,
    activation_name,
    affine,
    feed_forward_part,
    is_linear,
)
from .structure import Seen, read_structure, signature
from .trial import check_part

Reader = Callable[[Any], FeedForwardPart | None]

_READERS: dict[type | str, Reader] = {}


def register_ffn(kind: type[nn.Module] | str, reader: Reader) -> None:
    """Let ``core.sparsify`` recognize feed-forward networks of a class of yours.

    Args:
        kind: the class, or its path such as ``my_package.nets.Mlp``, which is imported by nobody here. Subclasses are
            read too.
        reader: makes a ``core.convert.FeedForwardPart`` of a module of that class, as ``feed_forward_part`` does, or
            returns None if the module is another kind of network. A ``ValueError`` says why it cannot be read.

    Raises:
        ValueError: ``kind`` is neither a class of modules nor the path of one.

    Example::

        def read(mlp):
            return core.convert.feed_forward_part(
                core.convert.affine(mlp.up), core.convert.affine(mlp.down), activation=mlp.act
            )

        core.convert.register_ffn(MyMlp, read)
    """
    is_class = isinstance(kind, type) and issubclass(kind, nn.Module)
    if not (is_class or (isinstance(kind, str) and kind.rpartition(".")[0])):
        raise ValueError(f"kind={kind!r} is neither a class of modules nor the path of one, as my_package.nets.Mlp")
    _READERS[kind] = reader


def read_ffn(module: nn.Module, seen: Seen | None = None) -> FeedForwardPart | None:
    """Return the description of a module as a feed-forward network; None if it is another kind of module.

    Args:
        module: any module.
        seen: what was read of modules like it, which are read once; it gets what is read now.

    Raises:
        ValueError: it is one that no expert can compute, such as one with a norm between its layers.
    """
    part = _read_known(module)
    read = read_structure(module, {} if seen is None else seen) if part is None else part
    return None if isinstance(read, ValueError) else read


def _read_known(module: nn.Module) -> FeedForwardPart | None:
    """Return what a reader of the module's class, or of the names and kinds of its children, makes of it."""
    for kind in type(module).__mro__:
        for key in (kind, f"{kind.__module__}.{kind.__qualname__}"):
            if key in _READERS:
                return _READERS[key](module)
    part = _read_block(module)
    return _read_sequential(module) if part is None else part


def recognized_ffns(model: nn.Module) -> dict[str, FeedForwardPart]:
    """Return the dense feed-forward networks of a model that can be replaced, by dotted name, in the model's order.

    A network within another one, or within an MoE layer, is not listed; nor is a module of more than three linear
    layers, unless its class or the names in it are known.
    """
    parts: dict[str, FeedForwardPart] = {}
    seen: Seen = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        part = None
        # One that no expert computes is not listed: ``named_part`` says why.
        with contextlib.suppress(ValueError):
            if not isinstance(module, MoELayer):
                few = sum(map(is_linear, module.modules())) <= 3
                part = read_ffn(module, seen) if few else _read_known(module)
        if part is not None:
            parts[name] = part
        if part is not None or isinstance(module, MoELayer):
            inside += (f"{name}." if name else "",)
    return parts


def _rate(dropout: object) -> float:
    """Return the probability of a dropout; 0 for None and ``nn.Identity``.

    Raises:
        ValueError: it is another module.
    """
    if dropout is None or isinstance(dropout, nn.Identity):
        return 0.0
    if type(dropout) is not nn.Dropout:
        raise ValueError(f"a {type(dropout).__name__} stands where nn.Dropout is expected")
    return float(dropout.p)


def _read_block(module: nn.Module) -> FeedForwardPart | None:
    """Read a block whose network is spread over several children, as in BERT, BART or ALBERT, and their like."""
    for names in _IN_BLOCKS:
        if names.is_of(module):
            return _read_in_block(module, names)
    into, out = getattr(module, "intermediate", None), getattr(module, "output", None)
    dense, act = getattr(into, "dense", None), getattr(into, "intermediate_act_fn", None)
    last = getattr(out, "dense", None)
    if not isinstance(into, nn.Module) or act is None or not (is_linear(dense) and is_linear(last)):
        return None
    assert isinstance(dense, nn.Module)
    assert isinstance(last, nn.Module)
    # The dropout behind the second product, the residual and the norm stay in ``output``.
    return feed_forward_part(
        affine(dense),
        affine(last),
        activation=act,
        at="intermediate",
        emptied=("output.dense",),
        dense=lambda x: last(into(x)),
    )


@dataclass(frozen=True)
class _NamesInBlock:
    """Names of a block's own children that compute ``w_out(act(w_in(x)))`` next to its attention.

    Attributes:
        attention: the attention; without it the module is not a block.
        w_in, w_out, act: the linear layers, the only ones, and the activation.
        hidden_dropout: attribute with the probability of the dropout behind the activation, if there is one.
    """

    attention: str
    w_in: str
    w_out: str
    act: str
    hidden_dropout: str | None = None

    def is_of(self, module: nn.Module) -> bool:
        """Return whether a module has children of these names."""
        linear = {name for name, child in module.named_children() if is_linear(child)}
        attention = getattr(module, self.attention, None)
        act = getattr(module, self.act, None)
        return linear == {self.w_in, self.w_out} and isinstance(attention, nn.Module) and callable(act)


_IN_BLOCKS = (
    # BART, mBART, Pegasus, Marian, M2M-100, OPT, Whisper
    _NamesInBlock("self_attn", "fc1", "fc2", "activation_fn", "activation_dropout"),
    _NamesInBlock("attention", "ffn", "ffn_output", "activation"),  # ALBERT
)


def _read_in_block(module: nn.Module, names: _NamesInBlock, layout: str = "tokens") -> FeedForwardPart:
    """Read a block that has the layers of its network next to its attention."""
    into, out, act = (getattr(module, name) for name in (names.w_in, names.w_out, names.act))
    dropout = getattr(module, names.hidden_dropout, None) if names.hidden_dropout else None
    return feed_forward_part(
        affine(into),
        affine(out),
        activation=act,
        hidden_dropout=float(dropout or 0.0),
        at=names.w_in,
        emptied=(names.act, names.w_out),
        settings={} if dropout is None else {str(names.hidden_dropout): 0.0},  # the experts have it
        layout=layout,
        dense=lambda x: out(functional.dropout(act(into(x)), float(dropout or 0.0), module.training)),
    )


def _read_torch_layer(module: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) -> FeedForwardPart:
    """Read a block of torch's transformer. The dropout of the hidden layer goes into the experts, the others stay."""
    fused = {"activation_relu_or_gelu": 0} if hasattr(module, "activation_relu_or_gelu") else {}

    return feed_forward_part(
        affine(module.linear1),
        affine(module.linear2),
        activation=module.activation,
        hidden_dropout=_rate(module.dropout),
        at="linear1",
        emptied=("dropout", "linear2"),
        # A copy of a decoder layer gets a ReLU if its activation is a child; torch's fused block calls no layers.
        settings={"activation": unchanged, **fused},
        layout="tokens" if module.self_attn.batch_first else "sequence_first",
        # In training torch's own method also has the dropout that stays.
        dense=lambda x: (
            module.linear2(module.dropout(module.activation(module.linear1(x))))
            if module.training
            else feed_forward(module, x)
        ),
    )


def unchanged(x: Tensor) -> Tensor:
    """Return ``x``: the activation of a block whose experts apply their own."""
    return x


def _read_sequential(module: nn.Module) -> FeedForwardPart | None:
    """Read an ``nn.Sequential`` of ``Linear, [BatchNorm1d], activation, [Dropout]`` as torch-rechub's, repeated."""
    if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
        return None
    children = [child for child in module.children() if not isinstance(child, nn.Identity)]
    if not children or not is_linear(children[0]):
        return None
    first, *others = (name for name, _ in module.named_children())
    # Other code asks for names that are not numbers, such as the first weight's dtype: the container stays.
    place: dict[str, Any] = {} if first.isdigit() else {"at": first, "emptied": tuple(others)}
    return _stack(children, "".join(map(_kind, children)), place)


def _kind(module: nn.Module) -> str:
    """Return a letter for a linear layer, a dropout, a batch norm or an activation, and "?" for another module."""
    if is_linear(module):
        return "L"
    if isinstance(module, nn.Dropout):
        return "D"
    if isinstance(module, nn.BatchNorm1d):
        return "N"
    return "?" if activation_name(module) is None else "A"


def _stack(parts: list[nn.Module], kinds: str, place: dict[str, Any]) -> FeedForwardPart | None:
    """Read equal layers of ``Linear, [BatchNorm1d], activation, [Dropout]`` as an ``MLP`` expert."""
    one = kinds[: kinds.find("L", 1)] if "L" in kinds[1:] else kinds
    if one not in ("LA", "LAD", "LNA", "LNAD") or kinds != one * kinds.count("L") or kinds in ("LA", "LAD"):
        return None
    layers = [parts[i : i + len(one)] for i in range(0, len(parts), len(one))]
    acts = {activation_name(layer[one.index("A")]) for layer in layers}
    rates = {_rate(layer[-1]) if "D" in one else 0.0 for layer in layers}
    act, norm = acts.pop(), "batch" if "N" in one else None
    if acts or len(rates) > 1 or act not in ACTIVATIONS:
        raise ValueError(f"layers of a stack have one activation of {', '.join(ACTIVATIONS)}, and one dropout")
    weights: dict[str, Tensor] = {}
    for i, layer in enumerate(layers):
        w, b = affine(layer[0])
        weights[f"w_{i}"] = w.detach()
        if norm:
            weights |= _batch_norm(i, layer[1], b)
        elif b is None:
            raise ValueError("each layer of a stack without batch norm has a bias")
        else:
            weights[f"b_{i}"] = b.detach()
    widths = tuple(weights[f"w_{i}"].shape[1] for i in range(len(layers)))
    config = MLP(widths, str(act), norm, rates.pop())
    return FeedForwardPart(config, weights, weights["w_0"].shape[0], widths[-1], **place)


def _batch_norm(i: int, norm: nn.Module, b: Tensor | None) -> dict[str, Tensor]:
    """Return the tensors of batch norm ``i`` of an ``MLP`` expert. A bias before it only moves the running mean."""
    assert isinstance(norm, nn.BatchNorm1d)
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None or norm.weight is None or norm.eps != 1e-5 or norm.momentum != 0.1:
        raise ValueError("a batch norm of an expert has weights, running statistics, eps=1e-5 and momentum=0.1")
    return {
        f"norm_weight_{i}": norm.weight.detach(),
        f"norm_bias_{i}": norm.bias.detach(),
        f"running_mean_{i}": mean.detach() - (0.0 if b is None else b.detach()),
        f"running_var_{i}": var.detach(),
    }


def _read_wrapped(module: nn.Module) -> FeedForwardPart | None:
    """Read torch-rechub's ``MLP``, a module around an ``nn.Sequential``."""
    layers = getattr(module, "mlp", None)
    part = _read_sequential(layers) if isinstance(layers, nn.Module) else None
    if part is None:
        raise ValueError("an MLP of torch-rechub has layers as experts have with output_layer=False and relu alone")
    return part


def named_part(name: str, module: nn.Module, seen: Seen | None = None) -> FeedForwardPart:
    """Return a module of this name as a feed-forward network, checked by numbers; ``seen`` is as in ``read_ffn``.

    Raises:
        ValueError: it is none, or one that no expert can compute; the message names it.
    """
    seen = {} if seen is None else seen
    with naming_module(name):
        part = _read_known(module)
        if part is not None:
            if (key := signature(module)) not in seen:
                check_part(module, part, _read_known)
            seen[key] = _read_known
            return part
    if isinstance(module, SparseFFN):
        raise ValueError(f"module {name!r} is sparse already")
    read = read_structure(module, seen)
    if isinstance(read, FeedForwardPart):
        return read
    within = [f"{name}.{inner}".lstrip(".") for inner in recognized_ffns(module)]
    hint = f"; there are {', '.join(within[:3])} in it" if within else f": {read}{_how_to_register(module)}"
    raise ValueError(
        f"module {name!r} is a {type(module).__name__}, which is no feed-forward network{hint}"
    ) from read.__cause__


def _how_to_register(module: nn.Module) -> str:
    """Return lines of Python that register a reader of a module's class; "" if it has less than two matrices."""
    kind = type(module)
    found = [(f"core.convert.affine(m.{name})", m.weight.shape) for name, m in module.named_modules() if is_linear(m)]
    found = found or [(f"(m.{name}, None)", p.shape) for name, p in module.named_parameters() if p.ndim == 2]
    if len(found) < 2:
        return ""
    # The gate stands before the other layer of its shape, whatever the last one's place.
    first, *others = sorted(found[: 3 if len(found) == 3 else 2], key=lambda one: one[1] != found[0][1])
    names = ", ".join(name for name, _ in ((*others, first) if len(others) == 2 else (first, *others)))
    return (
        ".\nIf it is one, say how it is computed, with its own names and activation:\n"
        f"core.convert.register_ffn({f'{kind.__module__}.{kind.__qualname__}'!r}, lambda m: "
        f"core.convert.feed_forward_part(\n    {names}, activation='gelu'\n))"
    )


register_ffn(nn.TransformerEncoderLayer, _read_torch_layer)
register_ffn(nn.TransformerDecoderLayer, _read_torch_layer)
register_ffn("torch_rechub.basic.layers.MLP", _read_wrapped)
for _side in ("Encoder", "Decoder"):  # BART's names, and (S, B, D) within the blocks
    register_ffn(
        f"transformers.models.fsmt.modeling_fsmt.{_side}Layer",
        functools.partial(_read_in_block, names=_IN_BLOCKS[0], layout="sequence_first"),
    )
