"""Which expert takes which clause of the queries that a decoder reads."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apps.data.subwords import EOS_ID, Subwords
from apps.nlp.pairs.routes import added
from apps.nlp.specialization import side_of
from apps.nlp.text.batches import TranslationBatch
from apps.report.page import Section
from apps.report.use import ExpertUse, Labels, map_parts

CLAUSES = ("SELECT", "FROM", "JOIN", "WHERE", "GROUP BY", "HAVING", "ORDER BY", "LIMIT")
_KEYWORD = re.compile(rf"\b(?:{'|'.join(CLAUSES)})\b")


def clauses(ids_BL: Tensor, subwords: Subwords) -> Tensor:
    """Return the clause that each token of a query belongs to, int64 (B, L), a place in `CLAUSES`; -1: none."""
    label_BL = np.full(ids_BL.shape, -1)
    for row, ids in enumerate(ids_BL.tolist()):
        pieces = [
            p.replace("▁", " ") if i > EOS_ID else "" for i, p in zip(ids, subwords.pieces(ids, "target"), strict=True)
        ]
        begins = list(_KEYWORD.finditer("".join(pieces)))
        place_L = np.searchsorted([own.start() for own in begins], np.cumsum([len(piece) for piece in pieces])) - 1
        label_L = np.array([*(CLAUSES.index(own[0]) for own in begins), -1])[place_L]
        label_BL[row] = np.where(np.array(ids) > EOS_ID, label_L, -1)
    return torch.from_numpy(label_BL)


def write_clauses(module: Any, batches: Iterable[TranslationBatch], folder: Path, draw: bool = True) -> Section:
    """Return the section on the clauses of a ``PairModule`` under its references, and plot ``expert_clause.png``."""

    def tokens(entry: Any, _: Tensor) -> dict[str, Tensor]:
        is_decoder = side_of(entry.name) == "target"
        return {"clause": clauses(entry.context.token_ids_BS, module.subwords).flatten()} if is_decoder else {}

    use = added(ExpertUse(tokens, {"clause": Labels("clause", len(CLAUSES))}), module, batches)
    path = folder / "expert_clause.png" if draw else None
    return Section("Clauses of SQL", tuple(map_parts([(use.counts["clause"], CLAUSES)], "a clause", "clause", path)))
