"""The routers by name: ``configs/routing/NAME.yaml``, overlays that put a router into any config with MoE layers.

``moesaic compare --routers`` and ``moesaic bench routing`` read them, so a router's settings are written once. torch is
imported where a layer is made: a name is checked without it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from apps.base.files import CONFIGS

if TYPE_CHECKING:
    import core
    from apps.equal_cost.comparable import Baseline, Comparable

    Layers = core.MoEConfig | core.MultiGateConfig

FOLDER = CONFIGS / "routing"
PREFIX = "router_"
"""Of a system's name in a comparison."""


def overlays() -> dict[str, Path]:
    """Return the overlays that come along, by name."""
    return {p.stem: p for p in sorted(FOLDER.glob("*.yaml"))}


def resolve(names: Iterable[str]) -> tuple[str, ...]:
    """Return names or paths of overlays, each file once; "all" is all that come along.

    Raises:
        ValueError: an unknown name, "all" where there is none, or two files that would share a name.
    """
    known = overlays()
    found: list[str] = []
    for name in names:
        if name == "all":
            if not known:
                raise ValueError("--routers all: no overlays in this installation")
            found += known
        elif name in known or Path(name).is_file():
            found.append(name)
        else:
            raise ValueError(f"router {name!r} is neither a file nor one of {', '.join(known) or '(none here)'}")
    return tuple(by_system(found).values())


def by_system(names: Iterable[str]) -> dict[str, str]:
    """Return the overlays by the name of their system in a comparison; one file named twice is one system.

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
    """Return the file of an overlay."""
    return overlays().get(name, Path(name))


def read(name: str) -> dict[str, Any]:
    """Return the part of an overlay that says what the MoE layers are: fields of ``MoEConfig`` or ``MMoE``.

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


def with_router(moe: Layers, name: str) -> Layers:
    """Return ``moe`` with the overlay over it; a multi-gate layer gets the router for its gates.

    Balance weights that the overlay does not set are the defaults.

    Raises:
        ValueError: the overlay's values do not fit ``moe``.
    """
    import core

    plain = moe.to_dict()
    values = {"balance": {}, **read(name)}
    if isinstance(moe, core.MoEConfig):
        return core.MoEConfig.from_dict({**plain, **values})
    return core.MultiGateConfig.from_dict({**plain, "init_args": {**plain["init_args"], **values}})


def match_flops(moe: Layers, flops: float, dim: int, **how: Any) -> Layers:
    """Return ``moe`` with experts as wide as makes a token cost ``flops``.

    Args:
        moe: a layer.
        flops: forward, a token.
        dim: D.
        how: further arguments of ``flops_per_token``.

    Raises:
        ValueError: its experts have no hidden dim.
    """
    from apps.equal_cost.widths import nearest_width, widened

    def at(width: int) -> Layers:
        return dataclasses.replace(moe, expert=widened(moe.expert, width))

    return at(nearest_width(lambda width: at(width).flops_per_token(dim, **how), flops))


@dataclass(frozen=True)
class Variant:
    """Makes ``module`` anew with another router at equal active FLOPs. A class and no closure: it pickles."""

    module: Comparable
    name: str

    def config(self) -> Layers:
        layers = self.module.routed_layers()
        assert layers is not None
        moe = with_router(layers.config, self.name)
        return match_flops(moe, layers.flops_per_token(), layers.dim, **layers.flops_arguments)

    def __call__(self) -> Any:
        return self.module.with_moe(self.config())


def system_name(name: str) -> str:
    return PREFIX + Path(name).stem


def variants(module: Comparable, names: Iterable[str]) -> Mapping[str, Baseline]:
    """Return the routers as systems to compare ``module`` with; those that cannot be built say why.

    Raises:
        ValueError: two overlays share a name, or the module has no layer whose router could be another.
    """
    from apps.equal_cost.comparable import Baseline
    from apps.nets.place import misfit

    found: dict[str, Baseline] = {}
    names, layers = list(names), module.routed_layers()
    if not names:
        return found
    if layers is None:
        raise ValueError(f"--routers {names[0]}: {type(module).__name__} has no layer to put it into")
    if not hasattr(layers.config, "router"):
        kind = type(layers.config).__name__
        raise ValueError(f"--routers {names[0]}: {kind} takes no router in place of its gates, MMoE does")
    for system, name in by_system(names).items():
        variant = Variant(module, name)
        try:
            config = variant.config()
        except ValueError as error:
            found[system] = Baseline(None, str(error))
            continue
        router: Any = config.router  # type: ignore[union-attr]
        problem = misfit(layers.place, router, config.balance)
        if problem is not None:
            found[system] = Baseline(None, problem)
        else:
            found[system] = Baseline(variant, f"{type(router).__name__}, {_width(config.expert)}")
    return found


def _width(expert: Any) -> str:
    if hasattr(expert, "hidden_dims"):
        return f"expert hidden dims {', '.join(map(str, expert.hidden_dims))}"
    return f"expert hidden dim {expert.hidden_dim}"
