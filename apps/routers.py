"""The routers by name: ``configs/routing/NAME.yaml``, overlays that put a router into any config with MoE layers.

``moesaic compare --routers`` and ``moesaic bench routing`` read them, so a router's settings are written once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import core
from apps.training import Baseline, SparseModule

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "routing"
PREFIX = "router_"
"""Of a system's name in a comparison."""


def overlays() -> dict[str, Path]:
    """The overlays that come with the source tree, by name."""
    return {p.stem: p for p in sorted(FOLDER.glob("*.yaml"))}


def resolve(names: Iterable[str]) -> tuple[str, ...]:
    """Names or paths of overlays, each file once; "all" is all that come with the source tree.

    Raises:
        ValueError: an unknown name, or two files that would share a name.
    """
    known = overlays()
    found: list[str] = []
    for name in names:
        if name == "all":
            found += known
        elif name in known or Path(name).is_file():
            found.append(name)
        else:
            raise ValueError(f"router {name!r} is neither a file nor one of {', '.join(known) or '(none here)'}")
    return tuple(by_system(found).values())


def by_system(names: Iterable[str]) -> dict[str, str]:
    """The overlays by the name of their system in a comparison; one file named twice is one system.

    Raises:
        ValueError: two files share a name.
    """
    found: dict[str, str] = {}
    for name in names:
        system = system_name(name)
        other = found.setdefault(system, name)
        if path_of(other).resolve() != path_of(name).resolve():
            raise ValueError(
                f"routers {other} and {name} would both be {Path(name).stem!r} in the table: rename a file"
            )
    return found


def path_of(name: str) -> Path:
    """The file of an overlay."""
    return overlays().get(name, Path(name))


def read(name: str) -> dict[str, Any]:
    """The part of an overlay that says what the MoE layers are: fields of ``MoEConfig``.

    Raises:
        ValueError: the file has no ``model.init_args.moe.router``.
    """
    path = path_of(name)
    try:
        values = yaml.safe_load(path.read_text())["model"]["init_args"]["moe"]
        values["router"]["class_path"]
    except (KeyError, TypeError):
        raise ValueError(f"{path} has no model.init_args.moe.router with a class_path") from None
    return dict(values)


def with_router(moe: core.MoEConfig, name: str) -> core.MoEConfig:
    """``moe`` with the overlay over it. Balance weights that the overlay does not set are the defaults.

    Raises:
        ValueError: the overlay's values do not fit ``moe``.
    """
    plain = moe.to_dict()
    return core.MoEConfig.from_dict({**plain, "balance": {}, **read(name)})


def match_flops(moe: core.MoEConfig, flops: float, dim: int, **how: Any) -> core.MoEConfig:
    """``moe`` with experts as wide as makes a token cost ``flops``.

    Args:
        moe: a layer whose expert config has a ``hidden_dim``.
        flops: forward, a token.
        dim: D.
        how: further arguments of ``MoEConfig.flops_per_token``.
    """

    def at(hidden: int) -> core.MoEConfig:
        return dataclasses.replace(moe, expert=dataclasses.replace(moe.expert, hidden_dim=hidden))  # type: ignore[call-arg]

    # Linear in the hidden dim: the router's share, and a slope.
    low, high = (at(h).flops_per_token(dim, **how) for h in (64, 128))
    slope = (high - low) / 64
    return at(max(1, round((flops - (low - 64 * slope)) / slope)))


@dataclass(frozen=True)
class Variant:
    """Makes ``module`` anew with another router at equal active FLOPs. A class and no closure: it pickles."""

    module: SparseModule
    name: str

    def config(self) -> core.MoEConfig:
        moe = self.module.moe_config
        assert moe is not None
        dim, how = self.module.moe_dim, self.module.moe_flops_arguments
        return match_flops(with_router(moe, self.name), moe.flops_per_token(dim, **how), dim, **how)

    def __call__(self) -> SparseModule:
        return self.module.with_moe(self.config())


def system_name(name: str) -> str:
    return PREFIX + Path(name).stem


def variants(module: SparseModule, names: Iterable[str]) -> Mapping[str, Baseline]:
    """The routers as systems to compare ``module`` with; those that cannot be built say why.

    Raises:
        ValueError: two overlays share a name, or the module has no MoE configuration whose router could be another.
    """
    found: dict[str, Baseline] = {}
    names = list(names)
    if names and module.moe_config is None:
        raise ValueError(
            f"--routers {names[0]}: {type(module).__name__} has no model.moe whose router could be another; a "
            "multi-gate layer's routers are compared as configurations of their own"
        )
    for system, name in by_system(names).items():
        variant = Variant(module, name)
        try:
            config = variant.config()
        except ValueError as error:
            found[system] = Baseline(None, str(error))
            continue
        lacking = [field for field in config.router.needs() if field not in module.context_fields]
        if lacking:
            problem = f"needs context.{lacking[0]}, which {type(module).__name__} does not give"
            found[system] = Baseline(None, problem)
        elif module.causal and not config.router.is_causal():
            found[system] = Baseline(None, f"{config.router.source()} lets later tokens change earlier ones")
        else:
            hidden = getattr(config.expert, "hidden_dim", None)
            found[system] = Baseline(variant, f"{type(config.router).__name__}, expert hidden dim {hidden}")
    return found
