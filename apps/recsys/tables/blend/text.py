"""Trees in LightGBM's text format from a file that nobody vouches for.

LightGBM checks how many numbers a tree has, but not that they are places in it: a wrong one would read any memory.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from apps.base.messages import first_line

_TREE = re.compile(r"\n\n+Tree=\d+\n")
_SIZES = re.compile(r"^tree_sizes=.*\n", re.MULTILINE)
_NUMBERS = re.compile(r"[-+.0-9einfa ]*")


def booster_of(text: str, num_columns: int, per_round: int) -> Any:
    """Return the trees of a text as a ``lightgbm.Booster``.

    Args:
        text: content of the file.
        num_columns: columns of the rows that the trees are to read.
        per_round: trees of a round of boosting.

    Raises:
        ValueError: the text holds no trees, trees for other columns or outputs, or a number that is no place in a tree.
    """
    import lightgbm

    head, *trees = _TREE.split(text.partition("\n\nend of trees\n")[0])
    known, expected = _values(head), {"num_class": per_round, "num_tree_per_iteration": per_round}
    expected["max_feature_idx"] = num_columns - 1
    for name, number in expected.items():
        if known.get(name) != str(number):
            raise ValueError(f"{name} is {known.get(name)}, and the model's is {number}")
    if "\r" in text or not trees or len(trees) % per_round:
        raise ValueError(f"it has {len(trees)} trees, and a round has {per_round}")
    for place, tree in enumerate(trees):
        if not _is_sound(tree, num_columns):
            raise ValueError(f"tree {place} is damaged")
    try:
        # With the sizes, LightGBM reads in threads, in which an error ends the process.
        return lightgbm.Booster(model_str=_SIZES.sub("", text, count=1))
    except lightgbm.basic.LightGBMError as error:
        raise ValueError(first_line(error)) from error


def _values(lines: str) -> dict[str, str]:
    """Return the values of lines ``name=value``.

    Raises:
        ValueError: a name that occurs twice, of which LightGBM may take the other, or the start of a tree.
    """
    pairs = [line.partition("=") for line in lines.strip("\n").split("\n")]
    values = {name: value for name, _, value in pairs}
    if len(values) < len(pairs) or "Tree" in values:
        raise ValueError("a name occurs twice")
    return values


def _numbers(text: str, dtype: type) -> np.ndarray:
    if not _NUMBERS.fullmatch(text):
        raise ValueError(text)
    return np.array(text.split(), dtype=dtype)


def _is_sound(lines: str, num_columns: int) -> bool:
    """Return whether a tree's nodes split columns that exist, and lead to later nodes, leaves and sets that exist."""
    try:
        tree = _values(lines)
        leaves, num_sets = (int(_numbers(tree[name], np.int64)[0]) for name in ("num_leaves", "num_cat"))
        if leaves == 1:
            return num_sets == 0
        names = ("split_feature", "left_child", "right_child", "decision_type", "cat_boundaries", "cat_threshold")
        column_N, left_N, right_N, kind_N, start_S, sets = (_numbers(tree.get(name, ""), np.int64) for name in names)
        threshold_N = _numbers(tree["threshold"], np.float64)
    except (KeyError, IndexError, ValueError, OverflowError):
        return False
    if not leaves - 1 == len(column_N) == len(left_N) == len(right_N) == len(kind_N) == len(threshold_N):
        return False
    children, node = np.concatenate((left_N, right_N)), np.arange(leaves - 1)
    is_place = np.where(children < 0, children >= -leaves, (children > np.tile(node, 2)) & (children < leaves - 1))
    set_N, has_sets = threshold_N[kind_N & 1 == 1], num_sets > 0
    return bool(
        ((column_N >= 0) & (column_N < num_columns)).all()
        and is_place.all()
        and ((set_N >= 0) & (set_N < num_sets)).all()
        and len(start_S) == num_sets + has_sets
        and (not has_sets or (start_S[0] == 0 and start_S[-1] == len(sets) and (np.diff(start_S) >= 0).all()))
        and tree.get("is_linear", "0") == "0"
    )
