"""A run of a user's own module that was made sparse, converted in memory: dense again, or with fewer experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

import core
from apps.convert.figures import Figures, Trial, counted
from apps.convert.kinds import OneLayer, fewer_experts, one_for_all, one_of_many, with_fewer
from apps.convert.runs import Request
from apps.train.sparsified import SparsifyConfig
from core.config.plain import arguments_from_plain, from_plain, to_plain
from core.convert import SparseFFN, matching_parts, read_ffn


def figures(trial: Trial, num_bytes: int, metric: str | None) -> Figures:
    """Return the figures of a run whose steps are the user's: their FLOPs are not counted."""
    score = trial.validated(str(trial.cli.ckpt_path)).get(metric or "")
    return replace(counted(trial.model, num_bytes), score=score, metric=metric or "")


def statistics(trial: Trial, every_token: bool = False) -> dict[str, core.ExpertStatistics]:
    """Return the statistics of the experts over the validation, which ``figures`` has run before."""
    return core.expert_statistics(
        trial.model, [trial.cli.datamodule], lambda model, data: trial.validated(None), every_token=every_token
    )


def converted(kind: str, request: Request) -> tuple[nn.Module, dict[str, Any]]:
    """Return the new module, and the section ``sparsify`` of its checkpoint and its configuration, if it has one.

    Raises:
        ValueError: the conversion is not for such a run, or its layers become no networks of the user's module.
    """
    run, sparse = request.run, request.module
    layers = {name: m for name, m in sparse.named_modules() if isinstance(m, SparseFFN)}
    if kind == "prune" or getattr(request.options, "keep", None) is not None:
        fewer = fewer_experts(request)
        constants = bool(getattr(request.options, "constants", False))
        configs = [with_fewer(m.config, m.moe, request.options.keep, constants) for m in layers.values()]
        if any(config != configs[0] for config in configs):
            raise ValueError(f"the networks of {run.file} differ in width: prune them in a script, core.prune_experts")
        for name, layer in layers.items():
            fewer(f"{name}.moe", layer.moe)
        section = from_plain(run.checkpoint["sparsify"], SparsifyConfig, f"{run.file}: sparsify")
        section = replace(section, moe=configs[0], start="random", noise=0.0, seed=0, exact=False)
        return sparse, {"sparsify": to_plain(section, SparsifyConfig)}
    if kind not in ("densify", "specialise"):
        raise ValueError(f"{run.file} is of a model of your own, which densify, prune and specialise take, not {kind}")
    one = one_for_all(request) if kind == "densify" else one_of_many(request)
    return _dense(request, layers, one), {}


@torch.no_grad()
def _dense(request: Request, layers: dict[str, SparseFFN], one: OneLayer) -> nn.Module:
    """Return the user's dense module, with one expert's weights in each network that was made sparse."""
    run, checkpoint = request.run, request.run.checkpoint
    arguments = checkpoint.get("hyper_parameters") or {}
    dense: nn.Module = run.kind(**arguments_from_plain(run.kind, arguments, f"{run.file}: model"))
    section = from_plain(checkpoint["sparsify"], SparsifyConfig, f"{run.file}: sparsify")
    dense.load_state_dict(run.state, strict=False)
    for name, part in matching_parts(dense, section.modules).items():
        place = ".".join(filter(None, (name, part.at)))
        source = read_ffn(one(f"{place}.moe", layers[place].moe).feed_forward())
        if source is None or source.expert != part.expert:
            expert = "no feed-forward network" if source is None else source.expert
            raise ValueError(f"module {name!r} is {part.expert} in the dense model, and its layer becomes {expert}")
        for key, value in part.weights.items():  # views of the network's own tensors
            value.copy_(source.weights[key])
    return dense
