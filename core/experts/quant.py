"""``quantize_experts`` quantizes the experts' matrices, which take most of a model's memory."""

from __future__ import annotations

import torch
from torch import nn

from ..kernels import quantize
from .base import Experts


@torch.no_grad()
def quantize_experts(model: nn.Module, bits: int = 8, group_size: int | None = None) -> nn.Module:
    """Quantize the matrices of all experts of a trained model in place: weights only, symmetric (arXiv 2211.10017,
    section 5).

    Routed and shared experts are quantized, also with several gates and of several kinds. Routers, biases, norms and
    everything outside the experts stay. Each matrix (E, K, N) becomes buffers of the same name, which kernels
    dequantize when they multiply: ``values``, int8 (E, K, N) or in 4 bits uint8 (E, ceil(K / 2), N), and ``scales``,
    (E, groups, N). ``core.kernels.quantized`` describes the layout. Saved by its ``state_dict``, such a model is loaded
    into one that was quantized alike. The experts are frozen, and pass gradients on to what is before them: adapters of
    ``core.add_adapters`` train on them (QLoRA).

    Args:
        model: any module with experts, or experts themselves.
        bits: 8, or 4.
        group_size: inputs of a channel that share a scale; None: all of them do. Smaller groups are more exact, and
            have more scales.

    Returns:
        ``model``.

    Raises:
        ValueError: other bits; the model has no experts with matrices; a group size that does not divide the inputs of
            one of them; experts that are quantized already, offloaded or split over ranks; weights that are not finite.
            The model is left as it was.

    Example::

        core.quantize_experts(model, bits=4, group_size=64)
    """
    experts = {name: m for name, m in model.named_modules() if isinstance(m, Experts)}
    matrices = {
        f"{path}.{name}".lstrip("."): (module, name, parameter)
        for path, module in experts.items()
        for name, parameter in module.quantizable().items()
    }
    already = next((name for name, module in experts.items() if module.is_quantized), None)
    if already is not None:
        raise ValueError(f"the experts {already or 'of the model'} are quantized already")
    offloaded = next((name for name, module in experts.items() if module.cache is not None), None)
    if offloaded is not None:
        raise ValueError(f"the experts {offloaded or 'of the model'} are offloaded: they are quantized before")
    if not matrices:
        raise ValueError(f"a {type(model).__name__} has no experts with matrices to quantize")
    for name, (_, _, parameter) in matrices.items():
        if hasattr(parameter, "to_local"):
            raise ValueError(f"{name} is split over ranks: experts are quantized before")
        try:  # of a matrix without outputs nothing is computed
            quantize(parameter[:1, :, :0], bits, group_size)
        except ValueError as error:
            raise ValueError(f"{name} cannot be quantized: {error}") from None
        if not (parameter.is_meta or bool(parameter.isfinite().all())):
            raise ValueError(f"{name} has weights that are not finite: they have no scale")
    for module, name, parameter in matrices.values():
        module.put_quantized(name, quantize(parameter, bits, group_size))
    return model


def expert_bytes(model: nn.Module) -> int:
    """Return the bytes of the parameters and buffers of all experts of a model in this process."""
    experts = (m for m in model.modules() if isinstance(m, Experts))
    tensors = {id(t): t for m in experts for t in (*m.parameters(), *m.buffers())}
    return sum(t.to_local().nbytes if hasattr(t, "to_local") else t.nbytes for t in tensors.values())
