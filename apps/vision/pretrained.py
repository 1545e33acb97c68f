"""Pretrained weights of a ViT, read into a V-MoE."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.models import adapt_input_conv
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from apps.base.messages import first_line, some
from apps.vision.model import VMoE

_logger = logging.getLogger(__name__)
_PATCHES = "patch_embed.proj.weight"
"""The parameter that each vision transformer has once."""


@dataclass(frozen=True)
class LoadReport:
    """The parameters that ``load_pretrained_weights`` loaded and left out, by name.

    Attributes:
        loaded: parameters that were taken from the source.
        missing: parameters that only the model has, such as its head.
        unexpected: tensors that only the source has: its head, blocks beyond the model's depth.
        skipped: parameters that have another shape in the source: a head of other classes, a widened FFN.
        replaced: parameters of the model's MoE layers that the source lacks; they keep their initial values.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    skipped: tuple[str, ...]
    replaced: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} loaded"]
        for what, meaning in (
            ("missing", "not in the source, left untrained"),
            ("unexpected", "in the source alone, not taken"),
            ("skipped", "of another shape, left untrained"),
            ("replaced", "of MoE layers in place of an FFN, left untrained"),
        ):
            names = getattr(self, what)
            if names:
                more = ", ..." if len(names) > 4 else ""
                parts.append(f"{len(names)} {meaning} ({', '.join(names[:4])}{more})")
        return "; ".join(parts)


def load_pretrained_weights(model: VMoE, source: str | Path, option: str = "pretrained") -> LoadReport:
    """Load timm's weights into the dense parts of ``model`` and log one line about it.

    Patch and position embeddings are resampled to the model's by timm's own functions, and the first layer adapted to
    the number of channels. A model without a class token leaves the source's out; if the source normalizes before
    pooling and the model after it, or the other way round, the same norm is taken. FFNs that the model replaced stay at
    their initial values, unless ``source`` is an MoE model of the same shapes.

    Args:
        model: changed in place.
        source: a file (safetensors, or torch loaded with ``weights_only``), else the name of a timm model whose
            pretrained weights timm downloads.
        option: the name of ``source`` in messages.

    Raises:
        ValueError: no such file or timm model, the weights cannot be read or fetched, nothing in them fits, or they
            have another architecture: besides the head, blocks beyond the model's and replaced FFNs, a tensor is
            missing, unexpected or of another shape.
    """
    weights = _with_prefix_of(model, _read_weights(str(source), option))
    try:
        weights = checkpoint_filter_fn(weights, model)
    except RuntimeError as error:
        tokens = f"{model.num_prefix_tokens} class and register tokens (vit.pool={model.vit.pool})"
        raise ValueError(f"{option}={source} cannot be resampled for {tokens}: {first_line(error)}") from error
    if not model.has_class_token:
        weights.pop("cls_token", None)
    norm, other = ("fc_norm", "norm") if isinstance(model.norm, nn.Identity) else ("norm", "fc_norm")
    weights = {re.sub(rf"^{other}\.", f"{norm}.", name): w for name, w in weights.items()}
    patches = weights.get(_PATCHES)
    if patches is not None and patches.shape[1] != model.in_chans:
        if patches.shape[1] != 3:
            raise ValueError(f"{option}={source}: {patches.shape[1]} channels do not adapt to {model.in_chans}")
        weights[_PATCHES] = adapt_input_conv(model.in_chans, patches)
    own = model.state_dict()
    fits = {name: w for name, w in weights.items() if name in own and own[name].shape == w.shape}
    if not fits:
        raise ValueError(f"{option}={source}: none of its {len(weights)} tensors fits this model")
    missing = [n for n in own if n not in weights]
    unexpected = [n for n in weights if n not in own]
    skipped = [n for n in weights if n in own and n not in fits]
    differences = []
    for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", skipped)):
        if trunk := [n for n in names if _in_trunk(n, model)]:
            differences.append(f"{some(trunk, 3)} {'is' if len(trunk) == 1 else 'are'} {what}")
    if differences:
        raise ValueError(f"{option}={source} is of another architecture than model.vit: {', '.join(differences)}")
    model.load_state_dict(fits, strict=False)
    sparse = tuple(f"blocks.{i}.mlp." for i in model.moe_blocks) if model.moes else ()
    report = LoadReport(
        loaded=tuple(fits),
        missing=tuple(n for n in missing if not n.startswith(sparse)),
        unexpected=tuple(n for n in unexpected if not n.startswith(sparse)),
        skipped=tuple(skipped),
        replaced=tuple(n for n in missing if n.startswith(sparse)),
    )
    _logger.info("pretrained %s: %s", source, report)
    return report


def _in_trunk(name: str, model: VMoE) -> bool:
    """Return whether the model needs that tensor: it does not belong to a head, gate, replaced FFN or block beyond the
    last."""
    if ".depth_gate." in name:
        return False
    block = re.match(r"blocks\.(\d+)\.(mlp\.)?", name)
    if block is None:
        return not name.startswith("head.")
    return int(block[1]) < len(model.blocks) and not (block[2] and int(block[1]) in model.moe_blocks)


def _with_prefix_of(model: VMoE, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return ``weights`` with position embeddings of just those class and register tokens that have some in ``model``.

    Embeddings without a place are added to their tokens, which changes no output.
    """
    pos = weights.get("pos_embed")
    if pos is None or "register_tokens" in weights:  # DINOv2's own names: timm does the same
        return weights
    tokens = [name for name in ("cls_token", "reg_token") if name in weights]
    counts = [weights[name].shape[1] for name in tokens]
    wanted = 0 if model.no_embed_class else model.num_prefix_tokens
    # The patches of an image are a square: 196, and 197 with a class token. 9 may also be 4 with five tokens: of two
    # squares the model's own number of patches is taken, else what the model does with such tokens.
    length, own = pos.shape[1], model.patch_embed.num_patches
    squares = [n for n in (0, sum(counts)) if n < length and math.isqrt(length - n) ** 2 == length - n]
    embedded = max(squares, key=lambda n: (length - n == own, model.no_embed_class == (n == 0)), default=sum(counts))
    if embedded == wanted:
        return weights
    *prefix, patches = pos.split([*counts, length - embedded] if embedded else [length], dim=1)
    moved: dict[str, Tensor] = {name: weights[name] + part for name, part in zip(tokens, prefix, strict=False)}
    return {**weights, **moved, "pos_embed": torch.cat((pos.new_zeros(1, wanted, pos.shape[2]), patches), dim=1)}


def _read_weights(source: str, option: str) -> dict[str, Tensor]:
    if Path(source).is_file():
        from timm.models import load_state_dict

        try:
            weights = load_state_dict(source, weights_only=True)
        except Exception as error:  # a corrupt file raises whatever its format's reader raises
            raise ValueError(f"{option}={source} cannot be read: {_sentence(error)}") from error
        # A checkpoint of our own keeps the network under "model.", and a captioner its encoder under "model.encoder.".
        prefixes = [name.removesuffix(_PATCHES) for name in weights if name.endswith(_PATCHES)]
        prefix = prefixes[0] if len(prefixes) == 1 else ""
        return {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
    import timm

    if not timm.is_model(source.split(".")[0]):
        raise ValueError(f"{option}={source!r} is neither a file nor a timm model")
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # it writes two lines for each of its attempts
    try:
        return timm.create_model(source, pretrained=True).state_dict()
    except Exception as error:  # hub, network and file errors have no common base
        raise ValueError(f"{option}={source!r} cannot be fetched: {_sentence(error)}") from error
    finally:
        hub.setLevel(level)


def _sentence(error: BaseException) -> str:
    """Return the first sentence of the message of ``error``: torch explains a cut file in four."""
    return re.split(r"\.\s", first_line(error), maxsplit=1)[0].rstrip(".")
