"""``ItemIndex``: the vectors of all items, searched exactly, some rows of scores at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apps.base.files import replacing
from apps.base.messages import first_line
from apps.nets.exact_search import CHUNK_ELEMENTS, best_of, products
from apps.recsys.encoding.vocabulary import Vocabulary, whole_numbers
from apps.recsys.metrics import target_ranks

FILE = "items.safetensors"
"""Name of the index among the files of a test's report."""


class ItemIndex:
    """The vectors of I items, numbered from 1; number 0 means no item.

    Args:
        values: the items' own values, (I,).
        vectors_ID: float32 (I, D).
        made_by: fingerprint of the model that made the vectors.

    Attributes:
        values: the values, as integers where all of them are written as such.

    Raises:
        ValueError: not as many values as vectors, or none.
    """

    def __init__(self, values: Sequence[str], vectors_ID: Tensor, made_by: str = "") -> None:
        self.values, self.made_by = whole_numbers(values), made_by
        self._vectors_VD = torch.cat((vectors_ID.new_zeros(1, vectors_ID.shape[1]), vectors_ID))

    def __len__(self) -> int:
        return len(self.values)

    def named(self, item_N: Iterable[int]) -> list[Any]:
        """Return the values of items, given their numbers."""
        return [self.values[number - 1] for number in item_N]

    @property
    def vectors_ID(self) -> Tensor:
        """The vectors, float32 (I, D)."""
        return self._vectors_VD[1:]

    def save(self, path: str | Path) -> None:
        """Write the index to a file of safetensors, whole or not at all."""
        import pyarrow as pa
        from safetensors.torch import save

        texts = Vocabulary.of(pa.array(map(str, self.values), pa.string())).state()
        tensors = {"vectors": self.vectors_ID.cpu().contiguous(), **texts}
        with replacing(Path(path), "wb") as file:
            file.write(save(tensors, metadata={"format": "pt", "made_by": self.made_by}))

    @classmethod
    def load(cls, path: str | Path) -> ItemIndex:
        """Read an index that ``save`` has written.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is damaged, or holds no index.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"no item index {path}: a test of the retriever writes report/{FILE} into its run")
        try:
            with safe_open(path, framework="pt") as file:
                parts = {name: file.get_tensor(name) for name in ("vectors", "offsets", "content")}
                made_by = (file.metadata() or {}).get("made_by", "")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} holds no item index: {first_line(error)}") from error
        return cls(Vocabulary(parts["offsets"], parts["content"]).texts(), parts["vectors"], made_by)

    def search(self, query_BD: Tensor, k: int, seen_BH: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the k items with the largest dot products with each query, by comparing it with all of them.

        Args:
            query_BD: vectors of users.
            k: number of items; all of them where there are fewer.
            seen_BH: numbers of the items that are not candidates, padded with 0; None: all are.

        Returns:
            The items' numbers, int64 (B, k), and dot products, float32 (B, k), the best first. If a user has fewer
            candidates, the last places have the number 0 and the score -inf.
        """
        best = best_of((score_bV for score_bV, _ in self._scores(query_BD, seen_BH)), min(k, len(self)))
        return best.place_BK.masked_fill(best.score_BK == -math.inf, 0), best.score_BK

    def ranks(self, query_BD: Tensor, item_B: Tensor, seen_BH: Tensor | None = None) -> Tensor:
        """Return the rank of each query's item among all candidates, int64 (B,), 1 the best.

        An item with the same score ranks before it, and an item that is not a candidate, or none (0), is last of all:
        its rank is I + 1.
        """
        ranks = [target_ranks(score_bV, item_B[rows]) for score_bV, rows in self._scores(query_BD, seen_BH)]
        return torch.cat([item_B.new_empty(0), *ranks])

    def _scores(self, query_BD: Tensor, seen_BH: Tensor | None) -> Iterator[tuple[Tensor, slice]]:
        """Yield the dot products of some queries with all items, (b, I + 1), and which queries they are; -inf where an
        item is not a candidate."""
        for score_bV, chunk in products(query_BD, self._vectors_VD, CHUNK_ELEMENTS):
            score_bV[:, 0] = -math.inf
            if seen_BH is not None:
                score_bV.scatter_(1, seen_BH[chunk], -math.inf)
            yield score_bV, chunk
