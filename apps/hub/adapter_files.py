"""Low-rank adapters in PEFT's files: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from apps.base.files import write_json
from apps.porting.files import ADAPTER, ADAPTER_CONFIG, Safetensors, read_json, write_safetensors
from core.adopted.parts import AdoptedExperts
from core.contract import several_ranks
from core.convert.build.low_rank import adapted_modules, attach
from core.experts.adapters import LowRankUpdate
from core.parallel.parts import whole_of

_PREFIX = "base_model.model."
_BLOCKS = {"MixtralSparseMoeBlock", "PhimoeSparseMoeBlock", "MiniMaxM2SparseMoeBlock", "MiniMaxSparseMoeBlock"}
"""Blocks with experts named ``block_sparse_moe.experts.0.w1`` on the hub; others ``mlp.experts.0.gate_proj``."""
_ROLES = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "whole", "w2": "whole"}
Pair = tuple[Tensor, Tensor, float]
"""``lora_A``, ``lora_B`` and the factor on their product."""
_ONE_EXPERT = re.compile(rf"(.+)\.experts\.(\d+)\.({'|'.join(_ROLES)})")


def save_adapters(model: nn.Module, folder: str | Path, name: str = "default", one_per_expert: bool = False) -> None:
    """Write an adapter of an adopted model as PEFT's files. If its experts are sharded all ranks call it, and the first
    one writes.

    Args:
        model: adopted by ``core.adopt``, with adapters of ``core.add_adapters``.
        folder: is made, or its adapter is replaced.
        name: of the adapter.
        one_per_expert: write a pair of matrices for each expert and projection, as vLLM and PEFT before fused experts
            read them; else one of all experts, for PEFT's ``target_parameters``.

    Raises:
        ValueError: the model has no such adapter, or experts whose updates have no such names.
    """
    tensors: dict[str, Tensor] = {}
    modules, parameters = set[str](), set[str]()
    scales: dict[str, tuple[int, float]] = {}
    for path, adapters in adapted_modules(model):
        owner = model.get_submodule(path)
        own: Any = adapters[name] if name in adapters else {}  # noqa: SIM401 - a ModuleDict has no get
        updates = {
            place.replace("/", "."): _Whole(whole_of(u.a), whole_of(u.b), u.rank, u.scale) for place, u in own.items()
        }
        for key, update in (updates if one_per_expert else _alike(updates)).items():
            for where, a, b in _as_peft(model, path, owner, key, update, one_per_expert):
                tensors |= {f"{_PREFIX}{where}.lora_A.weight": a, f"{_PREFIX}{where}.lora_B.weight": b}
                scales[where.replace(".base_layer", "")] = (update.rank, update.scale)
                is_parameter = not isinstance(owner, nn.Linear) and not one_per_expert
                (parameters if is_parameter else modules).add(f"{path}.{key}" if is_parameter else where)
    if not tensors:
        raise ValueError(f"the model has no adapter {name!r}")
    rank, scale = next(iter(scales.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", None) or None,
        "r": rank,
        "lora_alpha": rank * scale,
        "rank_pattern": {where: r for where, (r, _) in scales.items() if r != rank},
        "alpha_pattern": {where: r * s for where, (r, s) in scales.items() if r * s != rank * scale},
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    if several_ranks() and dist.get_rank():
        return
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    write_safetensors(target / ADAPTER, {key: t.detach().cpu().contiguous() for key, t in tensors.items()})
    write_json(target / ADAPTER_CONFIG, config)


class _Whole(NamedTuple):
    """An update with all experts; its fields are those of ``LowRankUpdate``."""

    a: Tensor
    b: Tensor
    rank: int
    scale: float


def _alike(updates: dict[str, _Whole]) -> dict[str, _Whole]:
    """Return updates of one rank and one scale, as a module of PEFT's files has them."""
    if len({(u.rank, u.scale) for u in updates.values()}) < 2:
        return updates
    rank = max(u.rank for u in updates.values())
    return {
        key: _Whole(F.pad(u.a, (0, rank - u.rank)), F.pad(u.scale * u.b, (0, 0, 0, rank - u.rank)), rank, 1.0)
        for key, u in updates.items()
    }


def load_adapters(model: nn.Module, folder: str | Path, name: str = "default") -> nn.Module:
    """Add the adapter of PEFT's files to an adopted model, in place, and freeze all else.

    Args:
        model: adopted by ``core.adopt``.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        name: for the adapter in the model.

    Returns:
        ``model``.

    Raises:
        ValueError: files that are missing or damaged, another kind of adapter, tensors beside those of LoRA, an adapter
            of another model, or a name that is taken. The model is left as it was.
    """
    config, tensors = _read(Path(folder))
    for option in ("use_dora", "lora_bias", "modules_to_save", "fan_in_fan_out"):
        if config.get(option):
            raise ValueError(f"{folder}: {option}={config[option]!r} is not LoRA as core.add_adapters has it")
    grouped: dict[tuple[str, str], dict[str, dict[int, Pair]]] = {}
    updates: list[tuple[nn.Module, str, LowRankUpdate]] = []
    left = set(tensors)
    for key in sorted(tensors):
        where, found, rest = key.removeprefix(_PREFIX).partition(".lora_A")
        if not found:
            continue
        partner = key[: -len(rest) - 1] + "B" + rest
        if partner not in tensors:
            raise ValueError(f"{folder}: {key} has no lora_B beside it")
        left -= {key, partner}
        a, b = tensors[key], tensors[partner]
        of_one = _of_one_expert(model, where)
        if of_one is None:
            updates.append(_update(model, where, a, b, config, folder))
        else:
            path, matrix, role, e = of_one
            grouped.setdefault((path, matrix), {}).setdefault(role, {})[e] = (a, b, _scale(config, where, a.shape[0]))
    own = dict(model.named_parameters(remove_duplicate=False))
    for key in sorted(left):  # PEFT writes embeddings and heads beside their updates
        weight = own.get(key.removeprefix(_PREFIX).replace(".base_layer", ""))
        if weight is None or not torch.equal(tensors[key].to(weight), whole_of(weight)):
            raise ValueError(f"{folder} has {key}, which is no LoRA of a matrix")
    updates += [_joined(model, *place, each, folder) for place, each in grouped.items()]
    attach(model, updates, name)
    return model


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for file in (ADAPTER_CONFIG, ADAPTER):
        if not (folder / file).is_file():
            raise ValueError(f"{folder} has no {file}: it is no adapter of PEFT")
    config, tensors = read_json(folder / ADAPTER_CONFIG), dict(Safetensors(folder / ADAPTER))
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder}: peft_type={config.get('peft_type')!r} is not LORA")
    return config, tensors


def _scale(config: Mapping[str, Any], where: str, rank: int) -> float:
    """Return the factor on an update; patterns name the ends of modules' names, as PEFT reads them."""
    plain = where.replace(".base_layer", "")
    patterns = config.get("alpha_pattern") or {}
    try:
        alpha = next((v for k, v in patterns.items() if re.fullmatch(rf"(.*\.)?({k})", plain)), config["lora_alpha"])
        return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    except (KeyError, TypeError, AttributeError, re.error, ZeroDivisionError, OverflowError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{ADAPTER_CONFIG} is damaged: no factor of {where} follows from it ({what})") from error


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _stacked_keys(experts: AdoptedExperts) -> list[str]:
    """Return the keys of the matrices in the order of the module's parameters: PEFT wraps the first innermost."""
    shapes = experts.adapter_shapes()
    return [name for name, _ in experts.named_parameters() if name in shapes] or list(shapes)


def _as_peft(
    model: nn.Module, path: str, owner: nn.Module, key: str, update: _Whole, one_per_expert: bool
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the name of each module in PEFT's file, with ``lora_A`` (r, in) and ``lora_B`` (out, r)."""
    if not isinstance(owner, AdoptedExperts):
        yield path, update.a.t(), update.b.t()
    elif owner.one_each():
        for e, name in enumerate(n for n in owner._modules if n.startswith("expert_")):
            yield f"{path}.{name}.{key.removesuffix('.weight')}", update.a[e].t(), update.b[e].t()
    elif owner.layout.flat or not owner.layout.experts:
        raise ValueError(f"the experts {path!r} have no names in PEFT's files: merge the adapter instead")
    elif one_per_expert:
        block = path.rpartition(".")[0]
        kind = type(model.get_submodule(block)).__name__
        roles = ("w1", "w3", "w2") if kind in _BLOCKS else ("gate_proj", "up_proj", "down_proj")
        if kind in _BLOCKS:
            block = f"{block.rpartition('.')[0]}.block_sparse_moe"
        if owner.layout.transposed:
            raise ValueError(f"the experts {path!r} are fused in every file: one_per_expert is for others")
        halves = owner.halves(update.b, 2) if key == owner.layout.up else (None, update.b)
        parts = ((roles[2], update.b),) if key == owner.layout.down else zip(roles[:2], halves, strict=True)
        for role, b in parts:
            if b is not None:
                for e in range(owner.num_experts):
                    yield f"{block}.experts.{e}.{role}", update.a[e].t(), b[e].t()
    else:
        keys = _stacked_keys(owner)
        inner = ".base_layer" * (len(keys) - 1 - keys.index(key))
        # Rows by expert and then by rank; columns by rank and then by expert.
        yield f"{path}{inner}", update.a.transpose(1, 2).flatten(0, 1), update.b.permute(2, 1, 0).flatten(1)


def _of_one_expert(model: nn.Module, where: str) -> tuple[str, str, str, int] | None:
    """Return the stacked experts that one expert's module is of, the key of the matrix, "gate", "up" or "whole" of it,
    and the expert's number; None: the module is no single expert."""
    one = _ONE_EXPERT.fullmatch(where)
    if one and not _has(model, where):
        path = f"{one[1] if _has(model, one[1]) else one[1].replace('block_sparse_moe', 'mlp')}.experts"
        experts = model.get_submodule(path) if _has(model, path) else None
        if isinstance(experts, AdoptedExperts):
            layout, role = experts.layout, _ROLES[one[3]]
            return path, layout.down if role == "whole" else layout.up, role, int(one[2])
    for path, experts in _experts(model):
        names = [n for n, _ in experts.named_children() if n.startswith("expert_")]
        expert, _, leaf = where.removeprefix(f"{path}.").partition(".")
        if expert in names:
            return path, f"{leaf}.weight", "whole", names.index(expert)
    return None


def _update(
    model: nn.Module, where: str, a: Tensor, b: Tensor, config: Mapping[str, Any], folder: str | Path
) -> tuple[nn.Module, str, LowRankUpdate]:
    """Return a module, the key of a matrix and its update, from the tensors of one wrapper of PEFT."""
    path = where.replace(".base_layer", "")
    if not _has(model, path):
        raise ValueError(f"{folder} is for another model: this one has no {path!r}")
    owner: Any = model.get_submodule(path)
    if isinstance(owner, AdoptedExperts):
        keys, E = _stacked_keys(owner), owner.num_experts
        key = keys[len(keys) - 1 - where.count(".base_layer")]
        if a.shape[0] % E or b.shape[1] % E:
            raise ValueError(f"{folder} is for another model: {path!r} has {E} experts, its update {a.shape[0]} rows")
        a, b = a.unflatten(0, (E, -1)).transpose(1, 2), b.unflatten(1, (-1, E)).permute(2, 1, 0)
        shape: tuple[int, ...] = owner.adapter_shapes()[key]
    else:
        key, a, b = "weight", a.t(), b.t()
        shape = tuple(owner.weight.shape[::-1])
    return owner, key, _filled(shape, a, b, _scale(config, where, a.shape[-1]), path, folder)


def _filled(shape: tuple[int, ...], a: Tensor, b: Tensor, scale: float, path: str, folder: str | Path) -> LowRankUpdate:
    if (a.shape[-2], b.shape[-1]) != shape[-2:]:
        found = f"{a.shape[-2]}x{b.shape[-1]}"
        raise ValueError(f"{folder} is for another model: {path!r} is {shape[-2]}x{shape[-1]}, its update {found}")
    update = LowRankUpdate(shape, a.shape[-1], scale)
    with torch.no_grad():
        update.a.copy_(a)
        update.b.copy_(b)
    return update


def _experts(model: nn.Module) -> Iterator[tuple[str, AdoptedExperts]]:
    return ((name, m) for name, m in model.named_modules() if isinstance(m, AdoptedExperts))


def _joined(
    model: nn.Module, path: str, key: str, roles: Mapping[str, Mapping[int, Pair]], folder: str | Path
) -> tuple[nn.Module, str, LowRankUpdate]:
    """Return the update of stacked experts from those of single ones; an expert that the file lacks has none."""
    experts: Any = model.get_submodule(path)
    E, K, N = experts.adapter_shapes()[key]
    ranks = {role: max(a.shape[0] for a, _, _ in each.values()) for role, each in roles.items()}
    a_EKr, b_ErN, start = torch.zeros(E, K, sum(ranks.values())), torch.zeros(E, sum(ranks.values()), N), 0
    for role, each in roles.items():
        place = b_ErN if role == "whole" else experts.halves(b_ErN, 2)[role == "up"]
        for e, (a, b, scale) in each.items():
            if e >= E or a.shape[1] != K or b.shape[0] != place.shape[2]:
                raise ValueError(
                    f"{folder} is for another model: {path} has no expert {e} of {a.shape[1]}x{b.shape[0]}"
                )
            a_EKr[e, :, start : start + a.shape[0]] = a.t()
            place[e, start : start + a.shape[0]] = scale * b.t()
        start += ranks[role]
    return experts, key, _filled((E, K, N), a_EKr, b_ErN, 1.0, path, folder)
