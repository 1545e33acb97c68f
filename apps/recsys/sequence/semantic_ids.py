"""Semantic ids: items as short sequences of codes, similar items with the same first ones (TIGER, arXiv 2305.05065)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import core
from apps.data.parquet_files import read_parquet
from core.fields import Bounds, Checked, Count, Depth

_NEAR, _WIDTH = 10, 64
"""Places within which two items of a history count as neighbors, and numbers of the vectors that tell of them."""
_TITLE_TOKENS = 32


@core.register_config
@dataclass(frozen=True)
class SemanticIdsConfig(Checked):
    """The codes of items, and the decoder that generates the codes of the next item.

    An item has ``levels`` codes by residual k-means of its vector, each the nearest center to what those before leave,
    and a last one that counts the items with the same codes. TIGER has an RQ-VAE in place of k-means.

    Attributes:
        levels: codes of an item, without the last one.
        codes: codes of a level, K; at most the number of items.
        vectors: vectors of the items: "cooccurrence": a truncated SVD of how often two items are within 10 places in a
            training history; "titles": MiniLM's of the items' names; or a file of your own: safetensors or npz with a
            vector by item, or Parquet whose first column is the item and whose second is its vector.
        depth: layers of the decoder.
        beam_size: items that a search finds for each history, of which the metrics know no others.

    Raises:
        ValueError: a value out of its range.
    """

    prefix = "semantic_ids."

    levels: Count = 3
    codes: Annotated[int, Bounds(2)] = 256
    vectors: str = "cooccurrence"
    depth: Depth = 1
    beam_size: Count = 30

    def codes_of(self, data: Any) -> Tensor:
        """Return the codes of a ``HistoryData``'s items, int64 (num_items, levels + 1).

        Raises:
            ValueError: there are fewer items than codes, more than ``codes`` items have the same, the file cannot be
                read or lacks an item, or the sentence encoder is not installed.
        """
        if self.codes > data.num_items:
            raise ValueError(f"semantic_ids.codes={self.codes} exceeds the {data.num_items} items")
        if self.vectors == "cooccurrence":
            vectors = cooccurrence(data)
        elif self.vectors == "titles":
            from apps.porting.sentences import SentenceEncoder, encoder_folder

            encoder = SentenceEncoder(encoder_folder(None, "semantic_ids.vectors='titles'"))
            vectors = encoder.encode(data.item_names[1:], _TITLE_TOKENS).numpy()
        else:
            vectors = read_vectors(Path(self.vectors).expanduser(), data.item_values[1:])
        return with_last_code(residual_kmeans(vectors, self.levels, self.codes), self.codes)


def cooccurrence(data: Any) -> NDArray[np.float32]:
    """Return vectors of items that are near each other in the training histories, float32 (num_items, d).

    They are a truncated SVD of the counts c_ij of pairs, divided by sqrt(c_i c_j), so that frequent items do not take
    all dimensions.
    """
    from scipy import sparse
    from sklearn.decomposition import TruncatedSVD

    trains_N, histories = data.in_training, data.histories
    user_N = np.repeat(np.arange(len(histories.length_U)), histories.length_U)[trains_N]
    item_N = histories.item_N[trains_N] - 1
    pairs = []
    for k in range(1, _NEAR + 1):
        same = user_N[k:] == user_N[:-k]
        pairs.append(np.stack((item_N[k:][same], item_N[:-k][same])))
    one, other = np.concatenate(pairs, 1)
    shape = (data.num_items, data.num_items)
    counts = sparse.coo_matrix((np.ones(len(one), np.float32), (one, other)), shape).tocsr()
    counts = counts + counts.T
    scale = sparse.diags(1 / np.sqrt(np.maximum(np.asarray(counts.sum(1)).ravel(), 1)).astype(np.float32))
    width = min(_WIDTH, data.num_items - 1)
    found = TruncatedSVD(width, random_state=0).fit_transform(scale @ counts @ scale)
    return (found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def read_vectors(file: Path, items: tuple[str, ...]) -> NDArray[np.float32]:
    """Return the vectors of items from a file, float32 (num_items, d); see ``SemanticIdsConfig.vectors``.

    Raises:
        ValueError: the file is missing, of another kind or cannot be read, it lacks an item, or vectors differ in
            width or are not finite.
    """
    option = f"semantic_ids.vectors={str(file)!r}"
    try:
        if file.suffix == ".safetensors":
            from safetensors.numpy import load_file

            found = load_file(file)
        elif file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                found = dict(arrays)
        elif file.suffix == ".parquet":
            names, vectors = read_parquet(file).columns[:2]
            found = dict(zip(map(str, names.to_pylist()), map(np.asarray, vectors.to_pylist()), strict=True))
        else:
            raise ValueError("it is neither safetensors, npz nor Parquet")
        lacking = [item for item in items if item not in found]
        if lacking:
            raise ValueError(f"it has no vector of {len(lacking)} items, first {lacking[0]!r}")
        stacked = np.stack([np.asarray(found[item], np.float32).ravel() for item in items])
    except Exception as error:  # each library has its own
        raise ValueError(f"{option}: {error}") from error
    if not np.isfinite(stacked).all():
        raise ValueError(f"{option}: a vector is not finite")
    return stacked


def residual_kmeans(vectors: NDArray[np.float32], levels: int, codes: int) -> Tensor:
    """Return int64 (N, levels) codes of vectors (N, d): each level's are the nearest of ``codes`` centers to what the
    centers of the levels before leave of a vector."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    rest, found = vectors.astype(np.float32), []
    for _ in range(levels):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different rests than centers
            means = KMeans(codes, n_init=1, random_state=0).fit(rest)
        found.append(means.labels_)
        rest = rest - means.cluster_centers_[means.labels_]
    return torch.from_numpy(np.stack(found, 1)).long()


def with_last_code(codes_NL: Tensor, codes: int) -> Tensor:
    """Return (N, L + 1): the codes, and the number of the item among those with the same, from 0 in their order.

    Raises:
        ValueError: more items than ``codes`` have the same.
    """
    _, group_N, count_G = codes_NL.unique(dim=0, return_inverse=True, return_counts=True)
    if (most := int(count_G.max())) > codes:
        raise ValueError(f"{most} items have the same semantic id, and the last code tells {codes} apart: add levels")
    order_N = group_N.argsort(stable=True)
    last_N = torch.empty_like(group_N)
    last_N[order_N] = torch.arange(len(group_N)) - (count_G.cumsum(0) - count_G)[group_N[order_N]]
    return torch.cat((codes_NL, last_N[:, None]), 1)
