"""Charts of what experts compute: their loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from apps.report.page.charts import BarChart


def load_charts(
    tokens_per_expert: Mapping[str, np.ndarray],
    drop_rate: Mapping[str, float] | None = None,
    share_of: str = "routed pairs",
    names: Mapping[str, Sequence[str]] | None = None,
) -> list[BarChart]:
    """Return a chart for each layer: the share of ``share_of`` that each expert has, beside the even share.

    Args:
        tokens_per_expert: layer name to (E,) counts.
        drop_rate: layer name to the share of pairs that no expert computed.
        share_of: meaning of the counts.
        names: layer name to the names of its experts; None: they are numbers.
    """
    charts = []
    for layer, counts_E in tokens_per_expert.items():
        share_E = 100 * counts_E / max(float(counts_E.sum()), 1e-12)
        even = 100 / len(counts_E)
        own = tuple(map(str, range(len(counts_E)))) if names is None else tuple(names[layer])
        top = int(np.argmax(share_E))
        seen = (
            f"Expert {own[top]} has most, {share_E[top]:.1f} %, {share_E[top] / even:.2f} times the even {even:.3g} %"
        )
        if drop_rate is not None:
            seen += f"; {100 * drop_rate[layer]:.2g} % of the pairs were dropped"
        series = {layer or "load": tuple(map(float, share_E))}
        title = f"Load, {layer}" if layer else "Load"
        charts.append(BarChart(title, f"{seen}.", "expert", f"share of {share_of}, %", own, series, line=even))
    return charts
