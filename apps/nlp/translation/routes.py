"""The experts of a translation model in test sentences: read from many, and shown word by word of a few."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import core
from apps.data.subwords import BOS_ID, EOS_ID, PAD_ID, Side
from apps.nlp.specialisation import ExpertUse, side_of
from apps.nlp.text.batches import TranslationBatch
from apps.nlp.translation import pictures
from apps.nlp.translation.pictures import Routes
from apps.report.page import Part, Picture, Words
from apps.report.plots import save_picture
from apps.report.routed import experts_of_token, layer_label

_USUAL_LENGTH = 14  # source subwords of a sentence that is drawn, about
_MOST_EXPERTS = 2  # of a subword, written in its cell


# ---- all sentences


@torch.no_grad()
def expert_use(module: Any, batches: Iterable[TranslationBatch]) -> ExpertUse:
    """Read the experts of ``batches`` under the references; ``module`` is a ``Translator`` in evaluation."""
    use = ExpertUse(module.subwords, module.pairs)
    for batch in batches:
        source_BS, read_BL, *ids = module.example_inputs(_on(module, batch))
        with core.record(module.model) as tape:
            module.model.decode(read_BL, module.model.encode(source_BS, *ids))
        use.add(tape, batch.pair_B)
    return use


# ---- single sentences


def usual_sentences(batches: Iterable[TranslationBatch], most: int) -> list[TranslationBatch]:
    """Return sentences to draw as batches of one: of each pair in turn, one whose source is about 14 subwords long."""
    of_pair: dict[int, list[tuple[int, int, TranslationBatch, int]]] = {}
    for batch in batches:
        lengths = (batch.source_BS != PAD_ID).sum(1).tolist()
        for row, (length, pair, index) in enumerate(
            zip(lengths, batch.pair_B.tolist(), batch.index_B.tolist(), strict=True)
        ):
            own = of_pair.setdefault(pair, [])
            own.append((abs(length - _USUAL_LENGTH), index, batch, row))
            own.sort(key=lambda c: c[:2])
            del own[most:]
    order = sorted((place, pair) for pair, own in of_pair.items() for place in range(len(own)))
    chosen = [of_pair[pair][place] for place, pair in order[:most]]
    return [TranslationBatch(*(part[row : row + 1] for part in batch)) for _, _, batch, row in chosen]


@dataclass(frozen=True)
class Traced:
    """A sentence that a model has translated, and the passes over it and its translation.

    Attributes:
        source: S subwords of the source, with its tag and its end.
        read: L subwords that the decoder reads.
        written: L subwords that it is to say after each.
        attention: (layers, heads, L, S), the decoder's attention to the source.
        tape: the passes of the MoE layers.
    """

    source: tuple[str, ...]
    read: tuple[str, ...]
    written: tuple[str, ...]
    attention: torch.Tensor
    tape: core.Tape


@torch.no_grad()
def traced(module: Any, sentence: TranslationBatch, written: Sequence[int]) -> Traced:
    """Pass a sentence and a translation of it through the model.

    Args:
        module: a ``Translator`` in evaluation.
        sentence: a batch of one, without padding.
        written: ids of the translation, with ``EOS_ID`` at its end.
    """
    one = _on(module, sentence)
    one = one._replace(target_BL=one.source_BS.new_tensor([[BOS_ID, *written]]))
    source_1S, read_1L, *ids = module.example_inputs(one)
    with core.record(module.model) as tape:
        attention = module.model.cross_attention(source_1S, read_1L, *ids)[:, 0].float()
    subwords = module.subwords
    source = tuple(subwords.pieces(source_1S[0].tolist(), "source"))
    read, said = (tuple(subwords.pieces(x, "target")) for x in (read_1L[0].tolist(), written))
    return Traced(source, read, said, attention, tape)


@torch.no_grad()
def write_sentence(module: Any, sentence: TranslationBatch, number: int, folder: Path) -> list[Part]:
    """Translate one sentence and draw ``sentence_<number>_attention.png`` and, of a sparse model, ``_experts.png``.

    The attention is the mean over the heads of the last decoder layer but one, where it follows the words best
    (arXiv 1909.02074).

    Returns:
        What a page shows of it.
    """
    source = sentence.source_BS[0][sentence.source_BS[0] != PAD_ID]
    one = _on(module, sentence._replace(source_BS=source[None]))
    trace = traced(module, one, [*module.translate(one, module.decode).best[0], EOS_ID])
    heading = f"{module.pairs[int(sentence.pair_B)]}, sentence {int(sentence.index_B) + 1}"
    weights = trace.attention
    layer, heads = max(len(weights) - 2, 0), weights.shape[1]
    picture = pictures.attention_map(
        weights[layer].mean(0).cpu().numpy(),
        trace.source,
        trace.written,
        f"{heading}: attention of decoder layer {layer}, mean of {heads} heads",
    )
    name = f"sentence_{number}_attention.png"
    save_picture(picture, folder / name)
    seen = f"which of the {len(trace.source)} source subwords each of the {len(trace.written)} written ones attends to"
    shown: list[Part] = [Picture(name, f"{heading}: {seen}", f"{heading}: attention of the decoder.")]
    if not len(trace.tape):
        return shown
    experts: dict[Side, dict[str, np.ndarray]] = {"source": {}, "target": {}}
    for entry in trace.tape.entries:
        chosen = experts_of_token(entry.routing, _MOST_EXPERTS).cpu().numpy()
        experts[side_of(entry.name)][layer_label(entry.name)] = chosen
    sides = [
        Routes("encoder layer", trace.source, experts["source"]),
        Routes("decoder layer", trace.read, experts["target"]),
    ]
    num_experts = max(len(entry.routing.tokens_per_expert_E) for entry in trace.tape.entries)
    several = any((ids[:, 1:] < num_experts).any() for side in sides for ids in side.experts.values())
    what = "experts of each subword, by falling gate" if several else "expert of each subword"
    picture = pictures.sentence_routes(sides, num_experts, f"{heading}: {what}")
    save_picture(picture, folder / f"sentence_{number}_experts.png")
    words = []
    for side_name, side in zip(("source", "translation as it is read"), sides, strict=True):
        if side.experts:
            of_layers = {layer: ids_TK.tolist() for layer, ids_TK in side.experts.items()}
            words.append(Words.of_pieces(f"{heading}, {side_name}: {what}", side.pieces, of_layers, num_experts))
    return [*words, *shown]


def _on(module: Any, batch: TranslationBatch) -> TranslationBatch:
    return TranslationBatch(*(part.to(module.device) for part in batch))
