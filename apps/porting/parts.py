"""One of our parameters and the published tensors it is made of: the same table leads there and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from apps.base.messages import some
from apps.porting.vocabulary import Vocabulary


@dataclass(frozen=True)
class Part:
    """A parameter.

    Attributes:
        ours: its name in our state dict.
        theirs: names in theirs.
        join: their tensors to ours.
        split: ours to theirs.
    """

    ours: str
    theirs: tuple[str, ...]
    join: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Parts:
    """All parts of a model.

    Attributes:
        parts: each of our parameters once.
        aliases: names in a published state dict that are the tensor of another name; files may leave them out.
    """

    parts: tuple[Part, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)


def same(ours: str, theirs: str) -> Part:
    """Return the part of a parameter that is one published tensor, unchanged."""
    return Part(ours, (theirs,), lambda t: t[0], lambda t: [t])


def joined(ours: str, theirs: Iterable[str], rows: Sequence[int]) -> Part:
    """Return the part of products that we compute as one: their ``rows`` one after the other."""
    return Part(ours, tuple(theirs), lambda t: torch.cat(list(t)), lambda t: t.split(list(rows)))


def embedding(ours: str, theirs: str, vocabulary: Vocabulary) -> Part:
    """Return the part of an embedding, (V, D), whose rows are in our order."""
    to_ours, to_theirs = vocabulary.theirs, vocabulary.ours
    return Part(ours, (theirs,), lambda t: t[0][to_ours.to(t[0].device)], lambda t: [t[to_theirs.to(t.device)]])


def stacked(ours: str, theirs: Iterable[str]) -> Part:
    """Return the part of one ``nn.Linear`` an expert: (E, in, out) of its weights, or (E, out) of its biases."""

    def turned(t: Tensor) -> Tensor:
        return t.mT if t.ndim == 2 else t

    return Part(
        ours, tuple(theirs), lambda t: torch.stack([turned(w) for w in t]), lambda t: [turned(w) for w in t.unbind()]
    )


def cut(ours: str, theirs: str, num: int, *, dim: int) -> Part:
    """Return the part of a wide ``nn.Linear`` as ``num`` experts: its hidden units, on ``dim``, in as many runs."""

    def join(t: Sequence[Tensor]) -> Tensor:
        return t[0].unflatten(dim, (num, -1)).movedim(dim, 0).mT

    return Part(ours, (theirs,), join, lambda t: [t.mT.movedim(0, dim).flatten(dim, dim + 1)])


def linear(ours: str, theirs: str, *, bias: bool) -> list[Part]:
    """Return the parts of an ``nn.Linear`` or a norm."""
    return [same(f"{ours}.{name}", f"{theirs}.{name}") for name in (("weight", "bias") if bias else ("weight",))]


def joined_linear(ours: str, theirs: Sequence[str], rows: Sequence[int], *, bias: bool) -> list[Part]:
    """Return the parts of several ``nn.Linear`` of ``rows`` outputs each, as one."""
    names = ("weight", "bias") if bias else ("weight",)
    return [joined(f"{ours}.{name}", [f"{t}.{name}" for t in theirs], rows) for name in names]


def self_attention(
    layer: str, norm: str, theirs: str, out: str, rows: Sequence[int], *, bias: bool, qkv_bias: bool | None = None
) -> list[Part]:
    """Return the parts of a layer's self-attention and of the norm before it.

    Args:
        layer: our layer.
        norm: their norm.
        theirs: their matrices, such as "layers.0.self_attn.{}_proj", with a place for "q", "k", "v" and ``out``.
        out: their word for the output product.
        rows: outputs of queries, keys and values.
        bias: whether norm and output have biases.
        qkv_bias: whether queries, keys and values have; None: as ``bias``.
    """
    return [
        *linear(f"{layer}.mixing_norm", norm, bias=bias),
        *joined_linear(
            f"{layer}.mixing.qkv",
            [theirs.format(x) for x in "qkv"],
            rows,
            bias=bias if qkv_bias is None else qkv_bias,
        ),
        *linear(f"{layer}.mixing.out", theirs.format(out), bias=bias),
    ]


def cross_attention(layer: str, norm: str, theirs: str, out: str, rows: Sequence[int], *, bias: bool) -> list[Part]:
    """Return the parts of a layer's cross-attention; ``rows`` are outputs of keys and values."""
    return [
        *linear(f"{layer}.cross_norm", norm, bias=bias),
        *linear(f"{layer}.cross_attn.q", theirs.format("q"), bias=bias),
        *joined_linear(f"{layer}.cross_attn.kv", [theirs.format(x) for x in "kv"], rows, bias=bias),
        *linear(f"{layer}.cross_attn.out", theirs.format(out), bias=bias),
    ]


def to_ours(table: Parts, theirs: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Return our state dict.

    Args:
        table: the parts.
        theirs: tensors by name.
        shapes: of our parameters.

    Raises:
        ValueError: tensors that are missing, of another shape, or have no place here.
    """
    _check_names(table, theirs)
    ours: dict[str, Tensor] = {}
    for part in table.parts:
        wanted = [t.shape for t in part.split(torch.empty(shapes[part.ours], device="meta"))]
        tensors = []
        for name, shape in zip(part.theirs, wanted, strict=True):
            tensors.append(_take(theirs, name, table.aliases))
            if tensors[-1].shape != shape:
                raise ValueError(f"tensor {name!r} is of shape {tuple(tensors[-1].shape)}, not {tuple(shape)}")
        ours[part.ours] = part.join(tensors)
    return ours


def _check_names(table: Parts, theirs: Mapping[str, Tensor]) -> None:
    """Raise a ``ValueError`` that lists the tensors that are missing, and those that have no place here."""
    wanted = [name for part in table.parts for name in part.theirs]
    missing = [name for name in wanted if not any(known in theirs for known in _names(name, table.aliases))]
    foreign = sorted(set(theirs) - set(wanted) - set(table.aliases))
    problems = []
    if missing:
        problems.append(f"tensors that are missing: {some(missing)}")
    if foreign:
        problems.append(f"tensors that have no place in this model: {some(foreign)}")
    if problems:
        raise ValueError("; ".join(problems))


def _names(name: str, aliases: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names by which a published checkpoint may have a tensor."""
    return (name, *(alias for alias, of in aliases.items() if of == name))


def _take(theirs: Mapping[str, Tensor], name: str, aliases: Mapping[str, str]) -> Tensor:
    return next(theirs[known] for known in _names(name, aliases) if known in theirs)


def to_theirs(table: Parts, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return their state dict, aliases included."""
    theirs: dict[str, Tensor] = {}
    for part in table.parts:
        theirs.update(zip(part.theirs, part.split(ours[part.ours]), strict=True))
    return {**theirs, **{alias: theirs[name] for alias, name in table.aliases.items()}}
