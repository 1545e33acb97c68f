"""The experts of each token, read from a recorded routing of any kind."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import core
from apps.report.exhibit import Gates, LayerPart, Patches, Pieces

MOST_EXPERTS = 2
"""Experts of a token that are written."""
_TOWERS = ("image", "text", "user", "item")
_PARTS = {".mixing.heads": "attention", ".depth_gate": "depth gate"}


def experts_of_token(routing: Any, most: int) -> Tensor:
    """Return the experts that compute each token, best first, int64 (T, most); -1 if there are fewer.

    Among equal gates the lower expert goes first. With soft slots and merged experts these are the experts of the
    largest shares, and -1 for padding.
    """
    E, T = len(routing.tokens_per_expert_E), routing.num_tokens
    if not isinstance(routing, core.Routing):
        ids_TK = routing.evidence.scores_TE.argsort(dim=-1, descending=True, stable=True)[:, :most]
        ids_TK = torch.nn.functional.pad(ids_TK, (0, most - ids_TK.shape[1]), value=-1)
        return ids_TK if routing.valid_T is None else ids_TK.masked_fill(~routing.valid_T[:, None], -1)
    computed_N = routing.expert_ids_N < E
    token_N, expert_N = routing.token_index_N[computed_N], routing.expert_ids_N[computed_N]
    order_N = expert_N.argsort(stable=True)
    for key_N in (-routing.gates_N.detach().float()[computed_N], token_N):  # the last key counts first
        order_N = order_N[key_N[order_N].argsort(stable=True)]
    token_N, expert_N = token_N[order_N], expert_N[order_N]
    counts_T = torch.bincount(token_N, minlength=T)
    place_N = torch.arange(len(token_N), device=token_N.device) - (counts_T.cumsum(0) - counts_T)[token_N]
    kept_N = place_N < most
    ids_TK = token_N.new_full((T, most), -1)
    ids_TK[token_N[kept_N], place_N[kept_N]] = expert_N[kept_N]
    return ids_TK


def expert_of_token(routing: Any) -> Tensor:
    """Return the first of ``experts_of_token``, int64 (T,)."""
    return experts_of_token(routing, 1).squeeze(1)


def expert_label_counts(routing: Any, label: Tensor, num_labels: int) -> Tensor:
    """Count the computed pairs by label and by expert, int64 (num_labels, E).

    With soft slots and merged experts each token counts for the expert of its largest share.

    Args:
        routing: routing of T tokens.
        label: int64 (T,), or (B,) with one label for each sequence of T / B tokens.
        num_labels: number of labels.
    """
    E = len(routing.tokens_per_expert_E)
    if isinstance(routing, core.Routing):
        token_index_N, expert_ids_N = routing.token_index_N, routing.expert_ids_N
    else:
        expert_ids_N = expert_of_token(routing)
        token_index_N = torch.arange(routing.num_tokens, device=expert_ids_N.device)
    label_T = label.repeat_interleave(routing.num_tokens // len(label))
    label_N = label_T.to(token_index_N.device)[token_index_N]
    cell_N = (label_N * E + expert_ids_N)[(expert_ids_N >= 0) & (expert_ids_N < E)]
    return torch.bincount(cell_N, minlength=num_labels * E).unflatten(0, (num_labels, E))


def gate_weights(routing: Any) -> Tensor:
    """Return the weight of each expert in each token's output, float32 (T, E)."""
    if not isinstance(routing, core.Routing):
        return routing.evidence.scores_TE.detach().float()
    E = len(routing.tokens_per_expert_E)
    weights_TE = torch.zeros(routing.num_tokens, E + 1, device=routing.gates_N.device)
    place = (routing.token_index_N, routing.expert_ids_N)
    return weights_TE.index_put(place, routing.gates_N.detach().float(), accumulate=True)[:, :E]


def experts_by_layer(entries: Iterable[Any], most: int = MOST_EXPERTS) -> dict[str, list[list[int]]]:
    """Return the first of ``experts_of_token`` for each ``choosing`` entry of a tape, by its layer in words."""
    return {layer_label(entry.name): experts_of_token(entry.routing, most).tolist() for entry in choosing(entries)}


def choosing(entries: Iterable[Any]) -> list[Any]:
    """Return the entries of a tape whose layers have several experts, else all: the gate of a block has one."""
    every = list(entries)
    return [entry for entry in every if len(entry.routing.tokens_per_expert_E) > 1] or every


def largest_number(entries: Iterable[Any]) -> int:
    """Return the number of experts of the entry of a tape that has most; 0 without entries."""
    return max((len(entry.routing.tokens_per_expert_E) for entry in entries), default=0)


def layer_label(layer: str) -> str:
    """Return a layer's name in words; a layer outside of stacks stays, without "model.".

    Example::

        layer_label("blocks.3.mlp")                           # "block 3"
        layer_label("stages.2.blocks.5.mlp")                  # "block 2.5"
        layer_label("groups.1.ffn.mlp")                       # "group 1"
        layer_label("decoder.layers.3.ffn")                   # "decoder 3"
        layer_label("decoder.layers.3.mixing.heads")          # "decoder 3 attention"
        layer_label("decoder.layers.3.depth_gate")            # "decoder 3 depth gate"
        layer_label("model.towers.image.blocks.1.mlp")        # "image block 1"
    """
    # Blocks of a stage are counted within it, so that all numbers are needed to tell them apart.
    stacks = r"(encoder|decoder)\.layers|blocks|groups|towers\.[\w.]+?\.layers"
    match = re.match(rf"(?:.*\.)?(?:{stacks})\.(?:\d+\.)+", layer)
    if match is None:
        return layer.removeprefix("model.")
    words = re.split(r"[._]", match[0])
    tower = "".join(f"{name} " for name in _TOWERS if name in words)
    part = next((f" {part}" for end, part in _PARTS.items() if layer.endswith(end)), "")
    stack = match[1] or f"{tower}{'group' if 'groups' in words else 'block'}"
    return f"{stack} {'.'.join(word for word in words if word.isdecimal())}{part}"


def words_by_layer(
    entries: Iterable[Any], words: Sequence[Sequence[str]], title: str, unit: str = "subwords"
) -> dict[str, tuple[Pieces, ...]]:
    """Return the experts of words by layer, in the order of the passes.

    A pass of another number of tokens is left out: few tokens enter its block, and have no places among the words.

    Args:
        entries: entries of a tape, of one sequence without padding.
        words: the tokens of each word; all tokens together are the sequence.
        title: title of the words.
        unit: name of a token on the page.
    """
    pieces = tuple(tuple(word) for word in words)
    kept = [entry for entry in entries if entry.routing.num_tokens == sum(map(len, pieces))]
    layers: dict[str, tuple[Pieces, ...]] = {}
    for name, entry in zip(layer_names([entry.name for entry in kept]), kept, strict=True):
        experts_TK = experts_of_token(entry.routing, MOST_EXPERTS).cpu().numpy()
        layers[name] = (Pieces(title, pieces, experts_TK, expert_names(entry.routing), unit),)
    return layers


def patches_by_layer(placed: Iterable[tuple[Any, Any]], image: np.ndarray) -> dict[str, tuple[LayerPart, ...]]:
    """Return the experts of an image's patches by layer, in the order of the passes.

    Args:
        placed: entries of a tape, each with the experts of its patches, (1, H, W, K); None if its tokens have no
            places in the image.
        image: the image as the model sees it.
    """
    kept = [(entry, ids_1HWK) for entry, ids_1HWK in placed if ids_1HWK is not None]
    names = layer_names([entry.name for entry, _ in kept])
    return {
        name: (Patches(image, ids_1HWK[0].cpu().numpy(), expert_names(entry.routing)),)
        for name, (entry, ids_1HWK) in zip(names, kept, strict=True)
    }


def gates_by_layer(
    gates: Iterable[tuple[str, str, Sequence[str], np.ndarray]], title: str
) -> Mapping[str, tuple[LayerPart, ...]]:
    """Return the weights of gates by layer, an expert a column, NaN where a gate does not reach one.

    Args:
        gates: the layer of each gate, its name, the names of its experts, and its weight for each, (E,).
        title: title of the weights.
    """
    by_layer: dict[str, list[tuple[str, Sequence[str], np.ndarray]]] = {}
    for layer, *gate in gates:
        by_layer.setdefault(layer, []).append(tuple(gate))  # type: ignore[arg-type]
    joined: dict[str, tuple[LayerPart, ...]] = {}
    for layer, own in by_layer.items():
        experts = tuple(dict.fromkeys(expert for _, names, _ in own for expert in names))
        weights = np.full((len(own), len(experts)), math.nan)
        for row, (_, names, weight_E) in zip(weights, own, strict=True):
            row[[experts.index(expert) for expert in names]] = weight_E
        joined[layer] = (Gates(title, tuple(name for name, *_ in own), experts, weights),)
    return joined


def expert_names(routing: Any) -> tuple[str, ...]:
    """Return the names that a routing gives its E experts, else their numbers."""
    names = getattr(routing, "expert_names", ()) or map(str, range(len(routing.tokens_per_expert_E)))
    return tuple(names)


def layer_names(names: Sequence[str]) -> list[str]:
    """Return a name in words for each entry of a tape, all different.

    Two layers of one block have the last part of their name added, and later passes of a layer their number.

    Example::

        layer_names(["blocks.0.mixing", "blocks.0.ffn", "blocks.1.ffn", "blocks.1.ffn"])
        # ["block 0 mixing", "block 0 ffn", "block 1", "block 1, pass 2"]
    """
    sharing = Counter(layer_label(name) for name in dict.fromkeys(names))
    seen: Counter[str] = Counter()
    labels = []
    for name in names:
        label = layer_label(name)
        label = f"{label} {name.rpartition('.')[2]}" if sharing[label] > 1 else label
        seen[label] += 1
        labels.append(label if seen[label] == 1 else f"{label}, pass {seen[label]}")
    return labels
