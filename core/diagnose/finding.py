"""``Finding``: one fault of a model's routing, its evidence and its remedy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One problem of a model's routing.

    Attributes:
        name: its name, a row of docs/reference/routers/findings.md.
        layer: dotted name of the layer, with the router's end if it has several; "" is the model itself.
        severity: "error": part of the layer does nothing, or does the wrong thing; "warning": it works below its worth.
        evidence: the figures in a sentence.
        remedy: what to change.
        figures: the figures by name.
    """

    name: str
    layer: str
    severity: Literal["error", "warning"]
    evidence: str
    remedy: str
    figures: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        place = f"{self.layer}: " if self.layer else ""
        return f"{self.severity}: {place}{self.name.replace('_', ' ')}: {self.evidence}. Remedy: {self.remedy}"
