"""Translators for ``moesaic export``: an encoder, a decoder that reads the next ids, and the subwords of both sides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from apps.data.subwords import EOS_ID
from apps.nlp.decode.exported import ExportedTranslator
from apps.nlp.decode.graphs import graphs_with_memory, spelling, writing
from apps.nlp.translation.module import task_numbers
from apps.train.exporting import Exported

if TYPE_CHECKING:
    from apps.nlp.translation.module import Translator
    from apps.train.exported import ExportedModel, OnnxGraph


def export(model: Translator) -> Exported:
    """Return the graphs, and what spells their ids.

    A pair's "prefix" are ids that stand before a source's own, such as the tag of the target language; ``EOS_ID``
    stands after them, and ``max_source_length`` counts all.

    Raises:
        ValueError: a router of the decoder cannot decide step by step.
    """
    vocab = model.model.source_vocab
    source_BS = torch.randint(EOS_ID + 1, vocab, (2, 4), device=model.device)
    graphs = graphs_with_memory(model.model, "source", source_BS, {0: "batch", 1: "source"}, "source")
    spelled, files = spelling(model.subwords)
    tasks, domains = task_numbers(model.pairs, model.tasks)
    pairs = {
        pair: {
            "prefix": [model.subwords.tag_id(pair.split("-")[1])] if model.subwords.languages else [],
            "task_ids": task,
            "domain_ids": domain,
        }
        for pair, task, domain in zip(model.pairs, tasks, domains, strict=True)
    }
    how = {"pairs": pairs, "max_source_length": model.longest_source, **writing(model.model, model.decode)}
    return Exported("translation", graphs, {**spelled, **how}, files)


def attach(model: Translator, graphs: Mapping[str, OnnxGraph]) -> None:
    """Let the translator run exported graphs."""
    model.model = ExportedTranslator(graphs["encoder"], graphs["decoder"], model.transformer)  # type: ignore[assignment]
    tasks, domains = task_numbers(model.pairs, model.tasks)
    model.task_P, model.domain_P = torch.tensor(tasks), torch.tensor(domains)


def encoding_state(exported: ExportedModel) -> dict[str, Any] | None:
    """Return None: the subwords are among the model's arguments."""
    return None
