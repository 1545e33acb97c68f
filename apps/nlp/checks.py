"""What must fit together: a model's subwords, positions and routers, and its data."""

from __future__ import annotations

import torch

import core
from apps.data.subwords import Subwords
from apps.nets.config import TransformerConfig
from apps.train.module import SparseModule


def check_subwords(own: Subwords, found: Subwords | None) -> None:
    """Refuse data that is cut into other subwords than the model reads.

    Raises:
        ValueError: naming the digests of both.
    """
    if found is not None and found.digest != own.digest:
        raise ValueError(
            f"the model's subwords have digest {own.digest}, the data's {found.digest}: it would read other words. "
            "Give the data the model's (data.subwords), or train anew"
        )


def check_length(transformer: TransformerConfig, option: str, length: int | None) -> None:
    """Refuse data whose sequences may be longer than a table of learned positions.

    Raises:
        ValueError: naming both lengths.
    """
    if length is not None and transformer.positions == "learned" and length > transformer.max_length:
        raise ValueError(
            f"{option}={length} exceeds model.transformer.max_length={transformer.max_length}, the positions that "
            "positions='learned' knows"
        )


def check_context(module: SparseModule, moe: core.MoEConfig | None) -> None:
    """Refuse a router, or losses, that ask for more of the context than the module gives its layers.

    Raises:
        ValueError: naming what is lacking.
    """
    if moe is None:
        return
    for part, needs in ((f"router {moe.router.source()}", moe.router.needs()), ("moe.balance", moe.balance.needs())):
        for name in needs:
            if name not in module.context_fields:
                raise ValueError(f"{part} needs context.{name}, which {type(module).__name__} does not give")
    # Some ask in training alone, or for one of several.
    given = core.RoutingContext(**dict.fromkeys(module.context_fields, torch.zeros(1)))
    for layer in core.moe_layers(module).values():
        layer.router.check_context(given)
