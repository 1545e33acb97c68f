"""How much experts say of labels, and which labels are typical of each, from counts of their routed pairs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def entropy(counts: np.ndarray) -> float:
    """Return the entropy of the shares of ``counts``, in bits; 0 without any."""
    p = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(p * np.log2(p)).sum()) if len(p) else 0.0


def mutual_information(counts_CE: np.ndarray) -> float:
    """Return I(E; C) in bits, from counts of labels by experts; 0 without any."""
    bits = entropy(counts_CE.sum(0)) + entropy(counts_CE.sum(1)) - entropy(counts_CE.ravel())
    return max(bits, 0.0)


def typical_labels(counts_CE: np.ndarray, names: Sequence[str], most: int = 10) -> list[list[str]]:
    """Return for each expert the labels that it takes far more of than by chance, the clearest first.

    In the order of ``p(e, c) log(p(e, c) / (p(e) p(c)))``, what each adds to the mutual information; those that the
    expert takes less of than by chance are left out.

    Args:
        counts_CE: routed pairs by label and expert.
        names: names of the labels.
        most: number of labels of an expert.
    """
    joint = counts_CE / max(int(counts_CE.sum()), 1)
    expected = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    gain = joint * np.log(np.divide(joint, expected, out=np.ones_like(joint), where=joint > 0))
    typical = []
    for e in range(counts_CE.shape[1]):
        order = np.argsort(-gain[:, e], kind="stable")[:most]
        typical.append([names[c] for c in order if gain[c, e] > 0])
    return typical
