"""``diagnose`` names the problems of a model's routing, with the evidence and a remedy.

The modules, from the ground up: ``finding`` (the result), ``passes`` (one pass of one layer, whoever made the layer),
``foreign`` (routers of other libraries, by their logits), ``figures`` (sums over passes), ``ranks`` (their sums over
processes), ``alike`` (experts on the same tokens, and a model without one of them), ``movement`` (weights since the
start), ``step`` (gradients of a training step), ``rules`` (figures to findings), ``doctor`` (the whole).
docs/reference/routers/findings.md has every finding.
"""

from .alike import ablate_experts
from .doctor import Doctor, diagnose
from .finding import Finding
from .movement import TrainingStart

__all__ = ["Doctor", "Finding", "TrainingStart", "ablate_experts", "diagnose"]
