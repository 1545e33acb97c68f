"""The experts of a model in test sentences: read from many, and shown word by word of a few."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

import core
from apps.data.subwords import BOS_ID, EOS_ID, PAD_ID
from apps.nlp.specialization import TextUse, side_of
from apps.nlp.text.batches import TranslationBatch
from apps.report.page import HeatmapChart, Part, Words, save_charts
from apps.report.routed import experts_by_layer, experts_of_token, largest_number
from apps.report.use import ExpertUse, tokens_of

_USUAL_LENGTH = 14  # source subwords of a plotted sentence, about


Use = TypeVar("Use", bound=ExpertUse)

# ---- all sentences


def expert_use(module: Any, batches: Iterable[TranslationBatch]) -> TextUse:
    """Read the experts of ``batches`` under the references; ``module`` is a ``PairModule`` in evaluation."""
    return added(TextUse(tokens_of(module), module.subwords, module.groups, module.noun), module, batches)


@torch.no_grad()
def added(use: Use, module: Any, batches: Iterable[TranslationBatch]) -> Use:
    """Add the experts of ``batches`` to a use, and return it."""
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
        module: a ``PairModule`` in evaluation.
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

    The attention is the mean over the heads of the last decoder layer but one, which follows the words best (arXiv
    1909.02074).

    Returns:
        The section for the page.
    """
    source = sentence.source_BS[0][sentence.source_BS[0] != PAD_ID]
    one = _on(module, sentence._replace(source_BS=source[None]))
    trace = traced(module, one, [*module.translate(one, module.decode).best[0], EOS_ID])
    heading = f"{module.groups[int(sentence.pair_B)]}, sentence {int(sentence.index_B) + 1}"
    layer, heads = max(len(trace.attention) - 2, 0), trace.attention.shape[1]
    title = f"{heading}: attention of decoder layer {layer}, mean of {heads} heads"
    attention = HeatmapChart.of(
        trace.attention[layer].mean(0).cpu().numpy(),
        trace.written,
        trace.source,
        title=title,
        row_title="written",
        column_title="source",
        value_title="attention, %",
    )
    save_charts([attention], folder / f"sentence_{number}_attention.png", title)
    if not len(trace.tape):
        return [attention]
    num_experts = largest_number(trace.tape.entries)
    several = any((experts_of_token(entry.routing, 2)[:, 1] >= 0).any() for entry in trace.tape.entries)
    what = "experts of each subword, by falling gate" if several else "expert of each subword"
    sides = {"source": ("source", trace.source), "target": ("translation as it is read", trace.read)}
    words, panels = [], []
    for side, (name, pieces) in sides.items():
        experts = experts_by_layer(entry for entry in trace.tape.entries if side_of(entry.name) == side)
        if experts:
            words.append(Words.of_pieces(f"{heading}, {name}: {what}", pieces, experts, num_experts))
            panels.append(replace(words[-1], title=name))
    save_charts(panels, folder / f"sentence_{number}_experts.png", f"{heading}: {what}")
    return [*words, attention]


def _on(module: Any, batch: TranslationBatch) -> TranslationBatch:
    return module.transfer_batch_to_device(batch, module.device, 0)
