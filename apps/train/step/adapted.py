"""The parts that a model has to have for a checkpoint's tensors: adapters on linear layers, quantized experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import core
from apps.train.cost.quantizing import form_of, quantize_model
from core.config.plain import from_plain


def take_form(module: Any, checkpoint: Mapping[str, Any]) -> None:
    """Make the parts of a ``SparseModule`` that a checkpoint's tensors belong to.

    Raises:
        ValueError: as ``adapt_linears``, and as ``quantize_model``.
    """
    adapt_linears(module, checkpoint)
    form = checkpoint.get("quantized")
    if form is not None and form_of(module) is None:
        quantize_model(module, str(form))


def adapt_linears(module: Any, checkpoint: Mapping[str, Any]) -> None:
    """Freeze the model and add the adapters to its linear layers that a checkpoint's ``adapted`` names.

    Nothing happens if it names none, or the updates are there. Their tensors are part of the ``state_dict``.

    Args:
        module: a ``SparseModule``.
        checkpoint: contents, whose ``adapted`` has ``moe``, a ``core.MoEConfig`` as plain values, and ``modules``,
            the patterns of ``core.add_adapters``.

    Raises:
        ValueError: as ``core.add_adapters``, or the values are no such config.
    """
    adapted = checkpoint.get("adapted")
    if adapted is not None and module.adapted is None:
        core.add_adapters(module, from_plain(adapted["moe"], core.MoEConfig, "adapted.moe"), adapted["modules"])
        module.adapted = adapted
