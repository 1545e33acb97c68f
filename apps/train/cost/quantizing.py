"""Quantized experts of a trained model, as the words ``int8``, ``int4`` and ``int4:64`` ask for them.

A command line is checked before torch is imported, which this file therefore only does in its functions.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import nn

M = TypeVar("M", bound="nn.Module")


@dataclass(frozen=True)
class Quantized:
    """The quantized part of a model.

    Attributes:
        experts: the word that asked for it, such as "int4:64".
        bytes_before, bytes_after: memory of the experts, scales included.
    """

    experts: str
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        fewer = self.bytes_before / self.bytes_after
        return (
            f"experts in {self.experts}: {self.bytes_after:,} bytes in place of {self.bytes_before:,}, or 1/{fewer:.2f}"
        )

    def record(self) -> dict[str, Any]:
        """Return plain values for the record of a test."""
        return asdict(self)


def read_form(how: str) -> tuple[int, int | None]:
    """Return the bits and the group size of a word such as "int4:64"; None: one scale a channel.

    Raises:
        ValueError: it is another word.
    """
    match = re.fullmatch(r"int(4|8)(?::([1-9]\d*))?", how)
    if match is None:
        raise ValueError(f"quantize={how} is not one of int8, int4, or either with a group size, such as int4:64")
    return int(match[1]), None if match[2] is None else int(match[2])


def quantize_model(model: M, how: str) -> M:
    """Quantize the experts of a trained model in place, and return it.

    Args:
        model: any module with experts.
        how: "int8" or "int4", with one scale a channel; "int8:64" or "int4:64", with one for 64 inputs of a channel.

    Raises:
        ValueError: another word, or a model that ``core.quantize_experts`` rejects.
    """
    import core

    bits, group_size = read_form(how)
    core.quantize_experts(model, bits, group_size)
    return model


def form_of(model: nn.Module) -> str | None:
    """Return how the experts of a model are quantized, as the word for ``quantize_model``; None: they are not.

    If every channel has one scale, a group size that is as long as a channel is not told from none.
    """
    from core.experts.matrices import QuantizedMatrices

    matrices = [m for m in model.modules() if isinstance(m, QuantizedMatrices)]
    if not matrices:
        return None
    bits = 8 if matrices[0].values.element_size() == 1 and matrices[0].values.is_signed() else 4
    sizes = {m.fan_in // m.scales.shape[1] for m in matrices if m.scales.shape[1] > 1}
    return f"int{bits}" + (f":{sizes.pop()}" if sizes else "")
