"""``add_adapters`` freezes a model and gives linear layers of it a mixture of adapters."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from ...config import MoEConfig
from ...experts import LoRA
from ...fields import check_values
from ...layers import AdaptedLinear, MoE
from ..read.names import matching_names
from .low_rank import ATTENTION, EXPERTS, place_of, put_adapters


def add_adapters(
    model: nn.Module, moe: MoEConfig | LoRA, modules: str | Sequence[str] | None = None, name: str = "default"
) -> nn.Module:
    """Freeze a trained model and add adapters to it: plain LoRA, or a mixture such as MoLoRA or (IA)^3.

    Only adapters train afterwards.

    - A ``LoRA`` gives each chosen matrix one low-rank update; of stacked experts each expert gets its own, and all are
      computed by grouped matmuls, whether the experts are plain or quantized (QLoRA). Names of parameters stay. The
      model starts with the outputs that it had. A model in half precision gets adapters in float32. Several may be
      added (``core.use_adapters``).
    - A ``MoEConfig`` replaces linear layers by ``AdaptedLinear``: a mixture of updates with a router of its own. The
      model calls a linear layer with tokens only, so that padding is routed as any token. With ``LoRA`` the adapted
      model starts with the outputs of the trained one; with ``IA3`` it does so if the gates of a token sum to 1.

    Args:
        model: any module, which is changed in place, or one ``nn.Linear``.
        moe: the adapters.
        modules: pattern of the dotted names of linear layers, or several, as ``fnmatch`` reads it: ``*`` also matches
            several names, so that ``*.q_proj`` is every layer of that name. None: ``model`` is an ``nn.Linear``. With a
            ``LoRA`` also "experts", "router" (of the MoE layers) and "attention" (linear layers whose name has "attn"
            or "attention"); None: experts and attention.
        name: of the adapter, if it is a ``LoRA``.

    Returns:
        ``model``, or the adapted linear layer.

    Raises:
        ValueError: a pattern names no module, or one that is not an ``nn.Linear`` or is read instead of being called;
            the router needs a context; the updates do not fit a layer's widths, or the name is taken. The model is
            left as it was.

    Example::

        moe = core.MoEConfig(8, core.TokenChoice(2), core.LoRA(8, alpha=16))
        core.add_adapters(model, moe, modules="blocks.*.attn.qkv")
        core.add_adapters(adopted, core.LoRA(8, alpha=16), modules=["experts", "router"])  # or plain LoRA
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    """
    if isinstance(moe, LoRA):
        default = "" if isinstance(model, nn.Linear) else (EXPERTS, ATTENTION)
        put_adapters(model, moe, default if modules is None else modules, name)
        return model
    check_values(MoEConfig, moe=moe)
    if modules is None:
        return AdaptedLinear(_linear("model", model), _updates(_linear("model", model), moe), moe.expert.follows_base)
    if moe.router.needs:
        needed = ", ".join(f"context.{name}" for name in moe.router.needs)
        raise ValueError(f"router {moe.router.source()} needs {needed}, which no linear layer is called with")
    # All are made before the first is put in: an error leaves the model as it was.
    places: list[tuple[nn.Module, str, nn.Linear]] = []
    updates: dict[nn.Linear, MoE] = {}
    linear_layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name in filter(None, matching_names(model, modules, linear_layers, "linear layers", fnmatchcase)):
        linear = _linear(f"module {name!r}", model.get_submodule(name))
        places.append((*place_of(model, name), linear))
        if linear not in updates:
            updates[linear] = _updates(linear, moe)
    model.requires_grad_(False)
    adapted = {linear: AdaptedLinear(linear, of, moe.expert.follows_base) for linear, of in updates.items()}
    for parent, child, linear in places:
        setattr(parent, child, adapted[linear])
    return model


def _linear(name: str, module: nn.Module) -> nn.Linear:
    if not isinstance(module, nn.Linear):
        raise ValueError(f"{name} is a {type(module).__name__}: adapters belong to an nn.Linear")
    return module


def _updates(linear: nn.Linear, moe: MoEConfig) -> MoE:
    """Return adapters of a linear layer, on its device, in its dtype and mode."""
    dim = linear.out_features if moe.expert.follows_base else linear.in_features
    return moe.build(dim, linear.out_features).to(linear.weight.device, linear.weight.dtype).train(linear.training)
