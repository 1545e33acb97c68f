"""The parts that all families of encoder-decoders have: embeddings, two stacks, experts and special ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

import core
from apps.porting.architecture import Architecture
from apps.porting.parts import Part, Parts, embedding, linear, stacked
from apps.porting.vocabulary import Vocabulary, special_id

HEAD = "lm_head.weight"
Tie = Literal["all", "inputs", "decoder", "none"]


def read_tie(tensors: Mapping[str, Tensor], prefix: str, *, own_head: bool) -> Tie:
    """Return which embeddings are one tensor. The tensors say it: configurations of several releases contradict them.

    Args:
        tensors: theirs.
        prefix: of the names of the encoder, the decoder and their shared parts.
        own_head: the configuration says that the output is not tied.
    """
    names = (f"{prefix}encoder.embed_tokens.weight", f"{prefix}decoder.embed_tokens.weight")
    source, target = (tensors[name] if name in tensors else tensors.get(f"{prefix}shared.weight") for name in names)
    head = tensors.get(HEAD, None if own_head else target)
    one_input = source is None or target is None or _equal(source, target)
    one_output = not own_head and (head is None or target is None or _equal(head, target))
    if one_input:
        return "all" if one_output else "inputs"
    return "decoder" if one_output else "none"


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or torch.equal(a, b)


Side = tuple[str, int, tuple[int, ...]]
"""A stack: "encoder" or "decoder", its number of layers, and its layers with experts."""


def sides(architecture: Architecture) -> tuple[Side, Side]:
    """Return the encoder and the decoder of an architecture."""
    shape = architecture.transformer.shape
    return (
        ("encoder", shape.encoder_layers, architecture.encoder_moe_blocks),
        ("decoder", shape.decoder_layers, architecture.decoder_moe_blocks),
    )


def model_parts(architecture: Architecture, prefix: str, stack: Callable[..., list[Part]]) -> Parts:
    """Return the table of a model: its embeddings, and what ``stack(architecture, *side)`` returns for each side."""
    embeddings, aliases = _embedding_parts(architecture.transformer.tie, prefix, architecture.vocabulary)
    stacks = [part for side in sides(architecture) for part in stack(architecture, *side)]
    return Parts((*embeddings, *stacks), aliases)


def expert_parts(moe: core.MoEConfig | None, ours: str, theirs: str, names: Mapping[str, str]) -> list[Part]:
    """Return the parts of an MoE layer; ``names`` gives an expert's published tensors by ours."""
    assert moe is not None
    experts = [f"{theirs}.experts.expert_{e}" for e in range(moe.num_experts)]
    gate_bias = moe.router.gate_bias  # type: ignore[attr-defined]  # a TokenChoice, as sparse_parts has checked
    return [
        *linear(f"{ours}.router.gate", f"{theirs}.router.classifier", bias=gate_bias),
        *(stacked(f"{ours}.experts.{our}", [f"{expert}.{name}" for expert in experts]) for our, name in names.items()),
    ]


def _embedding_parts(tie: str, prefix: str, vocabulary: Vocabulary) -> tuple[list[Part], dict[str, str]]:
    shared, source, target = (
        f"{prefix}{name}.weight" for name in ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
    )
    if tie in ("all", "inputs"):
        parts = [embedding("source_embed.weight", shared, vocabulary)]
        aliases = {source: shared, target: shared}
    else:
        parts = [
            embedding("source_embed.weight", source, vocabulary),
            embedding("target_embed.weight", target, vocabulary),
        ]
        aliases = {shared: source}  # not used in their forward
    if tie in ("inputs", "none"):
        parts.append(embedding("output.weight", HEAD, vocabulary))
    else:
        aliases[HEAD] = shared if tie == "all" else target
    return parts, aliases


def read_specials(config: Mapping[str, Any], unk: int) -> tuple[Vocabulary, Any]:
    """Return the vocabulary, and our ``TransformerConfig.start``.

    Their decoder starts with ``decoder_start_token_id``. Where that is the end of a sentence, our ``BOS_ID`` is their
    start, which nothing says, and is read as the end; if it is padding, it is a copy of it.
    """
    pad, bos, eos = (special_id(config, f"{name}_token_id") for name in ("pad", "bos", "eos"))
    start = special_id(config, "decoder_start_token_id", pad)
    begin = bos if start == eos else None if start == pad else start
    if begin in (pad, eos, unk):
        begin = None
    size, spare = config["vocab_size"], 0 if pad is None else pad
    return Vocabulary(size, pad, unk, begin, eos, spare), "eos" if start == eos else "bos"


def ids_of(architecture: Architecture) -> dict[str, Any]:
    """Return the values that ``read_specials`` reads, and ``tie_word_embeddings``.

    Raises:
        ValueError: the output is tied to one input of two.
    """
    config, vocabulary = architecture.transformer, architecture.vocabulary
    if config.tie == "decoder":
        raise ValueError("tie='decoder': published models tie all embeddings, or not the output")
    begins = vocabulary.pad if vocabulary.bos is None else vocabulary.bos
    start = vocabulary.eos if config.start == "eos" else begins
    return {**vocabulary.token_ids(), "decoder_start_token_id": start, "tie_word_embeddings": config.tie == "all"}


def sparse_step(indices: tuple[int, ...], sparse: Callable[[int, int], tuple[int, ...]], depth: int) -> int:
    """Return the step whose layers are ``indices``: 0 if there are none.

    Raises:
        ValueError: no step has them.
    """
    if not indices:
        return 0
    for step in range(1, depth + 1):
        if sparse(step, depth) == indices:
            return step
    raise ValueError(f"moe layers {list(indices)} of {depth} are not every n-th layer, as published models have them")
