"""Graphs of models that write: an encoder, and a decoder that goes on from the keys and values of what it has read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import core
from apps.nets.past import Past
from apps.nlp.decode.run import dropless
from apps.train.exporting import Graph

_BATCH, _LENGTH, _PAST = 2, 3, 5
"""Sizes of the example that a graph is traced with."""


class EncoderNetwork(nn.Module):
    """An encoder, and the keys and values of its output that the decoder's layers read.

    Args:
        model: a ``MemoryDecoder`` with its ``encode``.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Return the memory (B, S, D), its mask, bool (B, S), and each decoder layer's keys and values of it.

        Args:
            given: the arguments of ``model.encode``.
        """
        with dropless(self.model):
            memory = self.model.encode(*given)
        pairs = (layer.keys_and_values(memory.x_BSD) for layer in self.model.decoder.layers)
        return memory.x_BSD, memory.valid_BS, *(part for pair in pairs for part in pair)


class DecoderNetwork(nn.Module):
    """A decoder that reads the next ids of its rows: its inputs and outputs are tensors alone.

    Args:
        model: a language model, or a ``MemoryDecoder``.
        names: its inputs, in their order; see ``decoder_graph``.
    """

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Return the logits (B, L, V) of the id after each, and keys, values and hidden keys of P + L positions."""
        inputs = dict(zip(self.names, given, strict=True))
        past = Past(
            _pairs(inputs, "past_key", "past_value"),
            _numbered(inputs, "past_hidden"),
            _pairs(inputs, "memory_key", "memory_value"),
        )
        with dropless(self.model):
            logits_BLV = self.model.go_on(
                inputs["tokens"], past, inputs.get("task_ids"), inputs.get("domain_ids"), inputs.get("memory_mask")
            )
        return logits_BLV, *(part for pair in past.joined for part in pair), *past.joined_hidden


def encoder_graph(model: Any, inputs: Mapping[str, Tensor], dynamic: Mapping[str, Mapping[int, str]]) -> Graph:
    """Return the graph "encoder" of a model with a memory.

    Its outputs are "memory", "memory_mask", and "memory_key_i" and "memory_value_i" of each decoder layer i.

    Args:
        model: as in ``EncoderNetwork``.
        inputs, dynamic: as in ``Graph``.
    """
    layers = range(len(model.decoder.layers))
    outputs = ("memory", "memory_mask", *_named(layers, "memory_key", "memory_value"))
    return Graph("encoder", EncoderNetwork(model), inputs, outputs, dynamic)


def decoder_graph(
    model: Any, name: str, ids: Sequence[str] = (), memory: Sequence[Tensor] = (), source: str | None = None
) -> Graph:
    """Return the graph of a decoder; without past positions it reads the begin of a text, or a whole prompt.

    Its inputs are "tokens" (B, L); "task_ids" and "domain_ids" (B,), where routers ask for them; "memory_mask" and the
    other outputs of the encoder; "past_key_i" and "past_value_i" (B, H, P, d) of layer i, and "past_hidden_i" (B, P) of
    each layer that few tokens enter. Its outputs are "logits" (B, L, V), and "key_i", "value_i" and "hidden_i" of P + L
    positions, which are the past of the next call.

    Args:
        model: as in ``DecoderNetwork``.
        name: of the graph.
        ids: those of "task_ids" and "domain_ids" that are inputs.
        memory: the mask, and keys and values of each layer, of B = 2 source sentences; none in a language model.
        source: the name of their dynamic length; None: it is fixed.

    Raises:
        ValueError: a router of the decoder cannot decide step by step.
    """
    model.check_steps()
    weight, (heads, width) = model.target_embedding.weight, model.kept_heads
    layers = range(model.config.shape.decoder_layers)
    gated = range(sum(getattr(layer, "depth_gate", None) is not None for layer in model.decoder.layers))
    tokens_BL = torch.randint(4, len(weight), (_BATCH, _LENGTH), device=weight.device)
    inputs: dict[str, Tensor] = {"tokens": tokens_BL}
    dynamic: dict[str, dict[int, str]] = {"tokens": {0: "batch", 1: "length"}}
    for field in ids:
        inputs[field], dynamic[field] = weight.new_zeros(_BATCH, dtype=torch.int64), {0: "batch"}
    if memory:
        own = ("memory_mask", *_named(range((len(memory) - 1) // 2), "memory_key", "memory_value"))
        for field, tensor in zip(own, memory, strict=True):
            inputs[field] = tensor
            dynamic[field] = {0: "batch"} | ({} if source is None else {1 if tensor.ndim == 2 else 2: source})
    for field in _named(layers, "past_key", "past_value"):
        inputs[field], dynamic[field] = weight.new_zeros(_BATCH, heads, _PAST, width), {0: "batch", 2: "past"}
    for field in _named(gated, "past_hidden"):
        inputs[field] = weight.new_zeros(_BATCH, _PAST, dtype=torch.bool)
        dynamic[field] = {0: "batch", 1: "past"}
    outputs = ("logits", *_named(layers, "key", "value"), *_named(gated, "hidden"))
    return Graph(name, DecoderNetwork(model, list(inputs)), inputs, outputs, dynamic)


def ids_of(*stacks: nn.Module) -> tuple[str, ...]:
    """Return which of "task_ids" and "domain_ids" the routers of a model's parts ask for."""
    needs = {need for stack in stacks for layer in core.moe_layers(stack).values() for need in layer.router.needs}
    return tuple(name for name in ("task_ids", "domain_ids") if f"{name}_B" in needs)


def _named(numbers: Iterable[int], *names: str) -> tuple[str, ...]:
    return tuple(f"{name}_{i}" for i in numbers for name in names)


def _numbered(inputs: Mapping[str, Tensor], name: str) -> list[Tensor]:
    return [tensor for key, tensor in inputs.items() if key.rpartition("_")[0] == name]


def _pairs(inputs: Mapping[str, Tensor], first: str, second: str) -> list[tuple[Tensor, Tensor]]:
    return list(zip(_numbered(inputs, first), _numbered(inputs, second), strict=True))
