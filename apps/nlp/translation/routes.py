"""The experts of a translation model in test sentences: read from many, and shown word by word of a few."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import core
from apps.data.subwords import BOS_ID, EOS_ID, PAD_ID, Side
from apps.nlp.specialisation import ExpertUse, side_of
from apps.nlp.text.batch import TranslationBatch
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
    written = [*module.translate(one, module.decode).best[0], EOS_ID]
    one = one._replace(target_BL=one.source_BS.new_tensor([[BOS_ID, *written]]))
    source_1S, read_1L, *ids = module.example_inputs(one)
    with core.record(module.model) as tape:
        weights = module.model.cross_attention(source_1S, read_1L, *ids)[:, 0].float()
    subwords, pair = module.subwords, module.pairs[int(sentence.pair_B)]
    source_pieces = tuple(subwords.pieces(source.tolist(), "source"))
    read_pieces, written_pieces = (tuple(subwords.pieces(x, "target")) for x in (read_1L[0].tolist(), written))
    heading = f"{pair}, sentence {int(sentence.index_B) + 1}"
    layer, heads = max(len(weights) - 2, 0), weights.shape[1]
    picture = pictures.attention_map(
        weights[layer].mean(0).cpu().numpy(),
        source_pieces,
        written_pieces,
        f"{heading}: attention of decoder layer {layer}, mean of {heads} heads",
    )
    name = f"sentence_{number}_attention.png"
    save_picture(picture, folder / name)
    seen = (
        f"which of the {len(source_pieces)} source subwords each of the {len(written_pieces)} written ones attends to"
    )
    shown: list[Part] = [Picture(name, f"{heading}: {seen}", f"{heading}: attention of the decoder.")]
    if not len(tape):
        return shown
    experts: dict[Side, dict[str, np.ndarray]] = {"source": {}, "target": {}}
    for entry in tape.entries:
        chosen = experts_of_token(entry.routing, _MOST_EXPERTS).cpu().numpy()
        experts[side_of(entry.name)][layer_label(entry.name)] = chosen
    sides = [
        Routes("encoder layer", source_pieces, experts["source"]),
        Routes("decoder layer", read_pieces, experts["target"]),
    ]
    num_experts = max(len(entry.routing.tokens_per_expert_E) for entry in tape.entries)
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
