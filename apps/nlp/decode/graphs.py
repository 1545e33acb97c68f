"""Models that write as graphs for ``moesaic export``: an encoder, and a decoder that continues from what the encoder
has read."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import core
from apps.data.subwords import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from apps.data.text_files import CONTROL
from apps.nets.decode_cache import Memory
from apps.nets.past import Past
from apps.nlp.decode.config import DecodeConfig
from apps.nlp.decode.run import dropless
from apps.nlp.decode.search import max_positions
from apps.train.publish.exporting import Exported, Graph
from core.config.plain import to_plain
from core.convert.read.calls import evaluating

_BATCH, _LENGTH, _PAST = 2, 3, 5
"""Sizes of the example that a graph is traced with."""
_IDS = ("task_ids", "domain_ids")
"""Inputs that routers may ask for, int64 (B,)."""


class EncoderNetwork(nn.Module):
    """An encoder, and the keys and values that the decoder's layers make of its output.

    Args:
        model: a ``MemoryDecoder`` with its ``encode``.
        ids: those of "task_ids" and "domain_ids" that it is given beside the source.
    """

    def __init__(self, model: Any, ids: Sequence[str] = ()) -> None:
        super().__init__()
        self.model, self.ids, self.training = model, tuple(ids), model.training

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Return the memory (B, S, D), its mask, bool (B, S), and keys and values of each layer, (B, H, S, d).

        Args:
            given: the source, and the ids.
        """
        source, *ids = given
        named = {f"{name}_B": ids_B for name, ids_B in zip(self.ids, ids, strict=True)}
        with dropless(self.model):
            memory = self.model.encode(source, **named)
        pairs = [layer.keys_and_values(memory.x_BSD) for layer in self.model.decoder.layers]
        # Inputs of the decoder's graph, which are contiguous.
        return memory.x_BSD, memory.valid_BS, *(part.contiguous() for pair in pairs for part in pair)


class DecoderNetwork(nn.Module):
    """A decoder that reads the next ids of its rows. It takes and returns its cache, and has no state.

    Args:
        model: a language model, or a ``MemoryDecoder``.
        names: its inputs, in their order; see ``decoder_graph``.
    """

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names, self.training = model, tuple(names), model.training

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Return the logits (B, L, V) of the id after each, and keys, values and hidden keys of P + L positions."""
        inputs = dict(zip(self.names, given, strict=True))
        past = Past(
            _pairs(inputs, "past_key", "past_value"),
            _numbered(inputs, "past_hidden"),
            _pairs(inputs, "memory_key", "memory_value"),
        )
        ids, mask = (inputs.get("task_ids"), inputs.get("domain_ids")), inputs.get("memory_mask")
        copied = {}
        if mask is not None and "memory" in inputs:
            copied["source"] = Memory(inputs["memory"], mask, ids_BS=inputs["source"])
        with dropless(self.model):
            logits_BLV = self.model.go_on(inputs["tokens"], past, *ids, mask, **copied)
        # Inputs of the next call, which are contiguous.
        kept = [*(part for pair in past.joined for part in pair), *past.joined_hidden]
        return logits_BLV, *(part.contiguous() for part in kept)


def graphs_with_memory(
    model: Any, name: str, source: Tensor, dynamic: Mapping[int, str], length: str | None
) -> tuple[Graph, Graph]:
    """Return the graphs "encoder" and "decoder" of a model that writes of a source.

    The encoder's outputs are "memory", "memory_mask", and "memory_key_i" and "memory_value_i" of each decoder layer i;
    all but the first are inputs of the decoder, which ``decoder_graph`` describes. If the model copies, the first and
    the source are inputs too.

    Args:
        model: a ``MemoryDecoder`` with its ``encode``.
        name: of the source among the inputs.
        source: an example of it, of a batch of 2.
        dynamic: its axes that may have another length; see ``Graph``.
        length: the axis of the memory's length; None: it is fixed.

    Raises:
        ValueError: as ``decoder_graph``.
    """
    ids = _asked_for(model.encoder)
    inputs = {name: source, **{field: source.new_zeros(_BATCH, dtype=torch.int64) for field in ids}}
    network = EncoderNetwork(model, ids)
    with evaluating(model), torch.no_grad():
        memory = network(*inputs.values())
    layers = range(len(model.decoder.layers))
    outputs = ("memory", "memory_mask", *_named(layers, "memory_key", "memory_value"))
    axes = {name: dynamic, **{field: {0: "batch"} for field in ids}}
    encoder = Graph("encoder", network, inputs, outputs, axes)
    read = dict(zip(outputs, memory, strict=True))
    if model.copy_gate is None:
        del read["memory"]
    else:
        read[name] = source
    return encoder, decoder_graph(model, "decoder", read, length)


def decoder_graph(
    model: Any, name: str, memory: Mapping[str, Tensor] | None = None, length: str | None = None
) -> Graph:
    """Return the graph of a decoder, which starts a text, or reads a whole prompt, if it has no past positions.

    Its inputs are "tokens" (B, L); "task_ids" and "domain_ids" (B,), where routers ask for them; the encoder's outputs;
    "past_key_i" and "past_value_i" (B, H, P, d) of layer i, and "past_hidden_i" (B, P) of each layer that few tokens
    enter. Its outputs are "logits" (B, L, V), and "key_i", "value_i" and "hidden_i" of P + L positions, which are the
    past of the next call.

    Args:
        model: a language model, or a ``MemoryDecoder``.
        name: of the graph.
        memory: an encoder's outputs for a batch of 2, by their names; None: no encoder.
        length: as in ``graphs_with_memory``.

    Raises:
        ValueError: a router of the decoder cannot decide step by step.
    """
    model.check_steps()
    weight, (heads, width) = model.target_embedding.weight, model.kept_heads
    layers = range(model.config.shape.decoder_layers)
    gated = range(sum(layer.depth_gate is not None for layer in model.decoder.layers))
    inputs: dict[str, Tensor] = {"tokens": torch.randint(EOS_ID + 1, len(weight), (_BATCH, _LENGTH))}
    dynamic: dict[str, dict[int, str]] = {"tokens": {0: "batch", 1: "length"}}
    for field in _asked_for(model.decoder):
        inputs[field], dynamic[field] = torch.zeros(_BATCH, dtype=torch.int64), {0: "batch"}
    for field, tensor in (memory or {}).items():
        inputs[field], dynamic[field] = tensor, {0: "batch"}
        if length is not None:
            dynamic[field][1 if tensor.ndim < 4 else 2] = length
    for field in _named(layers, "past_key", "past_value"):
        inputs[field], dynamic[field] = weight.new_zeros(_BATCH, heads, _PAST, width), {0: "batch", 2: "past"}
    for field in _named(gated, "past_hidden"):
        inputs[field] = torch.zeros(_BATCH, _PAST, dtype=torch.bool)
        dynamic[field] = {0: "batch", 1: "past"}
    inputs = {field: tensor.detach().to(weight.device) for field, tensor in inputs.items()}
    outputs = ("logits", *_named(layers, "key", "value"), *_named(gated, "hidden"))
    return Graph(name, DecoderNetwork(model, list(inputs)), inputs, outputs, dynamic)


def _asked_for(stack: nn.Module) -> tuple[str, ...]:
    """Return which of "task_ids" and "domain_ids" the routers of a stack ask for."""
    routers = [layer.router for layer in core.moe_layers(stack).values()]
    needs = {need for router in routers for need in router.needs}
    if any(isinstance(router, core.Domain.router_class) for router in routers):
        needs.add("domain_ids_B")  # in evaluation it can do without, as another model
    return tuple(name for name in _IDS if f"{name}_B" in needs)


def _named(numbers: Iterable[int], *names: str) -> tuple[str, ...]:
    return tuple(f"{name}_{i}" for i in numbers for name in names)


def _numbered(inputs: Mapping[str, Tensor], name: str) -> list[Tensor]:
    return [tensor for field, tensor in inputs.items() if field.rpartition("_")[0] == name]


def _pairs(inputs: Mapping[str, Tensor], first: str, second: str) -> list[tuple[Tensor, Tensor]]:
    return list(zip(_numbered(inputs, first), _numbered(inputs, second), strict=True))


# ---- other than the graphs


def exported_writer(app: str, model: Any, graphs: tuple[Graph, ...], how: Mapping[str, Any]) -> Exported:
    """Return graphs with how texts are spelled and written, and the subword models' files.

    "subwords" are the files by side, "ids" the special ids, and "control" is a regular expression: its matches become a
    space, in texts that are read and in texts that are written. "decode" is the search, and "max_positions" how many
    the decoder knows; None: any number.

    Args:
        app: as in ``Exported``.
        model: a ``WritingModule``.
        graphs: of its network.
        how: further notes on inputs and outputs.
    """
    subwords = model.subwords
    names = ("subwords.model",) if subwords.is_joint else ("source.model", "target.model")
    files = {name: base64.b64decode(model) for name, model in zip(names, subwords.models, strict=True)}
    spelled = {
        "subwords": {"source": names[0], "target": names[-1]},
        "ids": {"pad": PAD_ID, "unk": UNK_ID, "bos": BOS_ID, "eos": EOS_ID},
        "control": CONTROL.pattern,
    }
    written = {"decode": to_plain(model.decode, DecodeConfig), "max_positions": max_positions(model.model)}
    return Exported(app, graphs, {**spelled, **how, **written}, files)
