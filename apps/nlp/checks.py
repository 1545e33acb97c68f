"""What must fit together: a model's subwords and positions, and its data."""

from __future__ import annotations

from apps.data.subwords import Subwords
from apps.nets.config import TransformerConfig


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
