"""Exported graphs under the interface that a search asks for, so that any method decodes over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from apps.nets.config import TransformerConfig
    from apps.train.publish.exported import OnnxGraph


class PastRows:
    """The inputs of a decoder's graph that each row keeps from step to step.

    Args:
        given: the constant inputs: ids for routers, and the encoder's outputs; in rows.
        past: keys and values of the positions read so far, by the names of the inputs; in rows.
    """

    def __init__(self, given: Mapping[str, Tensor], past: Mapping[str, Tensor]) -> None:
        self.given, self.past = dict(given), dict(past)

    def __len__(self) -> int:
        """R, the rows."""
        return len(next(iter(self.past.values())))

    def expand(self, copies: int) -> PastRows:
        """Repeat each row ``copies`` times, side by side. Changes the rows, and returns them."""
        self.given = {name: rows.repeat_interleave(copies, 0) for name, rows in self.given.items()}
        self.past = {name: rows.repeat_interleave(copies, 0) for name, rows in self.past.items()}
        return self

    def select(self, index: Tensor) -> PastRows:
        """Continue from these rows, in this order, as ``decode_cache.Cache.select``. Changes them, and returns them."""
        if len(index) != len(self):  # a sentence leaves; else each row's sentence stays where it is
            self.given = {name: rows.index_select(0, index) for name, rows in self.given.items()}
        self.past = {name: rows.index_select(0, index) for name, rows in self.past.items()}
        return self


class _ExportedDecoder(nn.Module):
    """A decoder's graph. It computes in the dtype that it was exported in, whatever the search asks for.

    Args:
        decoder: the graph that ``graphs.decoder_graph`` describes.
        config: the transformer that was exported.
    """

    def __init__(self, decoder: OnnxGraph, config: TransformerConfig) -> None:
        super().__init__()
        self.decoder, self.config = decoder, config

    def _begin(self, given: Mapping[str, Tensor | None], num_rows: int) -> PastRows:
        """Return rows that have read nothing yet."""
        known = {name: rows for name, rows in given.items() if rows is not None and name in self.decoder.inputs}
        past = {}
        for value in self.decoder.session.get_inputs():
            if value.name.startswith("past_"):
                shape = [{"batch": num_rows, "past": 0}.get(size, size) for size in value.shape]
                past[value.name] = torch.zeros(shape, dtype=torch.bool if "bool" in value.type else torch.float32)
        return PastRows(known, past)

    def step(self, token_R: Tensor, cache: PastRows) -> Tensor:
        """Read one more token of each row, and return the logits of the next, (R, V)."""
        logits_R1V, *grown = self.decoder({"tokens": token_R[:, None], **cache.given, **cache.past})
        names = (f"past_{name}" for name in self.decoder.outputs[1:])
        cache.past = dict(zip(names, grown, strict=True))
        return logits_R1V[:, 0]


class ExportedLanguageModel(_ExportedDecoder):
    """The graph of a language model."""

    def start(self, num_rows: int, task_ids_B: Tensor | None = None, domain_ids_B: Tensor | None = None) -> PastRows:
        """Return rows that have read nothing yet."""
        return self._begin({"task_ids": task_ids_B, "domain_ids": domain_ids_B}, num_rows)


class ExportedMemoryDecoder(_ExportedDecoder):
    """The graphs of a model that writes of a source: a translator, or a captioner.

    Args:
        encoder: the graph that ``graphs.graphs_with_memory`` describes.
        decoder, config: as in ``_ExportedDecoder``.
    """

    def __init__(self, encoder: OnnxGraph, decoder: OnnxGraph, config: TransformerConfig) -> None:
        super().__init__(decoder, config)
        self.encoder = encoder

    def encode(
        self, source: Tensor, task_ids_B: Tensor | None = None, domain_ids_B: Tensor | None = None
    ) -> dict[str, Tensor | None]:
        """Return the encoder's inputs and outputs, which ``start`` takes.

        Args:
            source: int64 (B, S) ids, or (B, C, H, W) normalized images.
            task_ids_B, domain_ids_B: int64 (B,), for routers that ask for them.
        """
        source = source.float() if source.is_floating_point() else source
        inputs = {self.encoder.inputs[0]: source, "task_ids": task_ids_B, "domain_ids": domain_ids_B}
        return {**inputs, **dict(zip(self.encoder.outputs, self.encoder(inputs), strict=True))}

    def start(self, memory: Mapping[str, Tensor | None]) -> PastRows:
        """Return rows that have read nothing yet, one for each source."""
        mask_BS = memory["memory_mask"]
        assert mask_BS is not None
        return self._begin(memory, len(mask_BS))
