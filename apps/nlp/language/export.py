"""Language models for ``moesaic export``: one graph, which reads a prompt or the next id, and the subwords."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from apps.nlp.decode.exported import ExportedLanguageModel
from apps.nlp.decode.graphs import decoder_graph, spelling, writing
from apps.train.exporting import Exported

if TYPE_CHECKING:
    from apps.nlp.language.module import LanguageModeler
    from apps.train.exported import ExportedModel, OnnxGraph


def export(model: LanguageModeler) -> Exported:
    """Return the graph, and what spells its ids: a text begins with ``EOS_ID``.

    Raises:
        ValueError: a router cannot decide step by step.
    """
    spelled, files = spelling(model.subwords)
    return Exported(
        "language", (decoder_graph(model.model, "model"),), {**spelled, **writing(model.model, model.decode)}, files
    )


def attach(model: LanguageModeler, graphs: Mapping[str, OnnxGraph]) -> None:
    """Let the language model run an exported graph."""
    model.model = ExportedLanguageModel(graphs["model"], model.transformer)


def encoding_state(exported: ExportedModel) -> dict[str, Any] | None:
    """Return None: the subwords are among the model's arguments."""
    return None
