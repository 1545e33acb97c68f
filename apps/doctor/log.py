"""What ``metrics.csv`` alone says of a run's routing: fewer faults than the model itself, and no data needed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import core
from core.diagnose.rules import DRIFT, HIGH_LEVEL, LARGE_LOGIT, POLARISED, drift_finding

FEW = 0.5
"""Load entropy over log E below which a load has collapsed: of 8 experts fewer than 3 are in use, or 2 of 4."""
DROPPED = 0.3
"""Drop rate from which drops are named. The log does not know what chance drops, which is least where tokens are many;
with the model at hand the bar is lower."""
_COLUMN = re.compile(r"(?:(?P<stage>val|train)/)?routing/(?P<layer>[^/]+)/(?P<figure>\w+)")
_GATE = re.compile(r"(?:^|\.)(?:task\d+|tasks|shared)$")


def log_findings(rows: Sequence[Mapping[str, Any]]) -> list[core.Finding]:
    """Return the findings of a log.

    Args:
        rows: those of ``metrics.csv``; a value that a row lacks is empty or missing.
    """
    findings: list[core.Finding] = []
    layers: dict[str, dict[str, list[float]]] = {}
    for column in dict.fromkeys(key for row in rows for key in row):
        match = _COLUMN.fullmatch(column or "")
        if match is None:
            continue
        figures, values = layers.setdefault(match["layer"], {}), series(rows, column)
        # Validation is of more tokens, without noise, and stands in for training where there is one.
        if values and (match["stage"] == "val" or match["figure"] not in figures):
            figures[match["figure"]] = values
    for layer, figures in layers.items():
        last = {name: values[-1] for name, values in figures.items()}
        findings += _gate(layer, last) if _GATE.search(layer) else _loads(layer, last, figures)
    findings += _level(series(rows, "train/router_z"))
    return findings


def series(rows: Sequence[Mapping[str, Any]], column: str) -> list[float]:
    """Return the numbers of a column, in the order of the rows."""
    values = (row.get(column) for row in rows)
    return [float(v) for v in values if v not in (None, "")]


def _loads(layer: str, last: Mapping[str, float], figures: Mapping[str, Sequence[float]]) -> Iterator[core.Finding]:
    entropy, imbalance = last.get("load_entropy", 1.0), last.get("load_imbalance", 1.0)
    dead = figures.get("dead_experts", [0.0])
    balance = "raise the weight of balance.load_balancing, or lower the learning rate"
    if entropy < FEW and imbalance >= 2:
        yield core.Finding(
            "collapsed_load",
            layer,
            "error",
            f"the load's entropy is {entropy:.0%} of an even one's, and an expert has {imbalance:.1f} times the mean",
            balance,
            {"load_entropy": entropy, "load_imbalance": imbalance},
        )
    elif min(dead[-2:]) >= 1 and len(dead) > 1:
        yield core.Finding(
            "dead_experts",
            layer,
            "warning",
            f"{dead[-1]:.0f} experts got no token in the last two looks",
            f"{balance}; or take them away by moesaic convert prune",
            {"dead": dead[-1]},
        )
    if last.get("drop_rate", 0.0) > DROPPED:
        yield core.Finding(
            "drops",
            layer,
            "warning",
            f"{last['drop_rate']:.0%} of the pairs had no room",
            "raise eval_capacity_factor (inf drops none) and capacity_factor, or balance the loads",
            {"drop_rate": last["drop_rate"]},
        )


def _gate(layer: str, last: Mapping[str, float]) -> Iterator[core.Finding]:
    """Yield whether a dense gate gives nearly all to one expert: then the load's entropy is below that of one that has
    ``POLARISED`` and another that has the rest, over log 2, the least E."""
    bound = -(POLARISED * math.log(POLARISED) + (1 - POLARISED) * math.log(1 - POLARISED)) / math.log(2)
    entropy = last.get("load_entropy", 1.0)
    if entropy < bound / 2:
        yield core.Finding(
            "polarised_gates",
            layer,
            "warning",
            f"the mean gate's entropy is {entropy:.0%} of an even one's",
            "set expert_dropout to 0.1, a balance loss on the gates, or a lower learning rate of the router",
            {"load_entropy": entropy},
        )


def _level(router_z: Sequence[float]) -> Iterator[core.Finding]:
    """Yield whether the logits have grown: ``router_z`` is the mean square of their logsumexp over all layers."""
    if len(router_z) < 8:
        return
    quarter = len(router_z) // 4
    levels = [math.sqrt(max(v, 0.0)) for v in router_z]
    first, last = sum(levels[:quarter]) / quarter, sum(levels[-quarter:]) / quarter
    if not all(map(math.isfinite, levels)) or last >= LARGE_LOGIT:
        yield core.Finding(
            "logits_overflow",
            "",
            "error",
            f"logsumexp of the logits is {levels[-1]:.3g} (root mean square)",
            "set balance.router_z to 0.001, or lower the router's learning rate (optimizer.router_lr_scale)",
            {"last": levels[-1]},
        )
    elif last > max(HIGH_LEVEL, DRIFT * first):
        yield drift_finding("", first, last)
