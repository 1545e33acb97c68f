"""What the families of encoder-decoders share: embeddings that may be one, and where the decoder starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from apps.porting.parts import Part, embedding
from apps.porting.vocabulary import Vocabulary, special_id

HEAD = "lm_head.weight"
Tie = Literal["all", "inputs", "decoder", "none"]


def read_tie(tensors: Mapping[str, Tensor], prefix: str, *, own_head: bool) -> Tie:
    """Which embeddings are one tensor. The tensors say it: configurations of several releases contradict them.

    Args:
        tensors: theirs.
        prefix: of the names of the encoder, the decoder and what they share.
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


def write_tie(tie: str) -> bool:
    """``tie_word_embeddings``.

    Raises:
        ValueError: the output is tied to one input of two.
    """
    if tie == "decoder":
        raise ValueError("tie='decoder': published models tie all embeddings, or not the output")
    return tie == "all"


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or torch.equal(a, b)


def embedding_parts(tie: str, prefix: str, vocabulary: Vocabulary) -> tuple[list[Part], dict[str, str]]:
    """Parts and aliases of the embeddings."""
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
    """The vocabulary, and our ``TransformerConfig.start``.

    Their decoder starts with ``decoder_start_token_id``. Where that is the end of a sentence, our ``BOS_ID`` is their
    begin, which nothing says, and is read as the end; where it is padding, it is a copy of it.
    """
    pad, bos, eos = (special_id(config, f"{name}_token_id") for name in ("pad", "bos", "eos"))
    start = special_id(config, "decoder_start_token_id", pad)
    begin = bos if start == eos else None if start == pad else start
    if begin in (pad, eos, unk):
        begin = None
    size, spare = config["vocab_size"], 0 if pad is None else pad
    return Vocabulary(size, pad, unk, begin, eos, spare), "eos" if start == eos else "bos"


def write_specials(vocabulary: Vocabulary, start: str) -> dict[str, Any]:
    """The values that ``read_specials`` reads."""
    begins = vocabulary.pad if vocabulary.bos is None else vocabulary.bos
    return {**vocabulary.token_ids(), "decoder_start_token_id": vocabulary.eos if start == "eos" else begins}
