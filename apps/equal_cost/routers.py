"""Routers by name: ``configs/routing/NAME.yaml`` are overlays that put a router into any config with MoE layers.

``moesaic compare --routers`` and ``moesaic bench routing`` read them, so a router's settings are written once. A file
may put other experts into the layers as well, as those of ``configs/experts`` do. torch is imported only where a layer
is made.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from apps.base.files import CONFIGS

if TYPE_CHECKING:
    import core
    from apps.equal_cost.comparison import Baseline, Comparison

    Layers = core.MoEConfig | core.MultiGateConfig

FOLDER = CONFIGS / "routing"
PREFIX = "router_"
"""Begins the name of a router's system in a comparison."""


def overlays() -> dict[str, Path]:
    """Return the files of the shipped overlays, by name."""
    return {p.stem: p for p in sorted(FOLDER.glob("*.yaml"))}


def resolve(names: Iterable[str]) -> tuple[str, ...]:
    """Return names or paths of overlays, each file once; "all" means all shipped ones.

    Raises:
        ValueError: an unknown name, "all" if there is none, or two files that would share a name.
    """
    known = overlays()
    chosen: list[str] = []
    for name in names:
        if name == "all":
            if not known:
                raise ValueError("--routers all: no overlays in this installation")
            chosen += known
        elif path_of(name).is_file():
            chosen.append(name)
        else:
            raise ValueError(f"router {name!r} is neither a file nor one of {', '.join(known) or '(none here)'}")
    return tuple(by_system(chosen).values())


def by_system(names: Iterable[str]) -> dict[str, str]:
    """Return the overlays by the name of their system in a comparison; a file named twice is one system.

    Raises:
        ValueError: two files share a name.
    """
    systems: dict[str, str] = {}
    for name in names:
        other = systems.setdefault(PREFIX + Path(name).stem, name)
        if path_of(other).resolve() != path_of(name).resolve():
            raise ValueError(
                f"routers {other} and {name} would both be {Path(name).stem!r} in the table: rename a file"
            )
    return systems


def path_of(name: str) -> Path:
    """Return the file of an overlay: a shipped one's, or one that is there, or lies beside the packages."""
    return overlays().get(name, Path(name) if Path(name).exists() else CONFIGS.parent / name)


def read(name: str) -> dict[str, Any]:
    """Return the options of the model that an overlay sets.

    Raises:
        ValueError: the file has no ``model.init_args``.
    """
    try:
        return dict(_sections(name)["model"]["init_args"])
    except (KeyError, TypeError, ValueError) as error:
        path = path_of(name)
        raise ValueError(f"{path} has no model.init_args, whose moe.router or moe.expert it would set") from error


def _sections(name: str) -> Any:
    return yaml.safe_load(path_of(name).read_text())


def layer_fields(name: str) -> dict[str, Any]:
    """Return the fields of ``MoEConfig`` or ``MMoE`` that an overlay sets.

    Raises:
        ValueError: the file sets something else, or a router or expert without a ``class_path``.
    """
    options = read(name)
    values = options.pop("moe", None)
    if options:
        raise ValueError(f"it sets model.init_args.{next(iter(options))}, and routers are compared by moe alone")
    if other := next((key for key in _sections(name) if key != "model"), None):
        raise ValueError(f"it sets {other}, and routers are compared by moe alone")
    if not isinstance(values, dict) or not values:
        raise ValueError("it sets no fields of one model.init_args.moe for all layers")
    for part in sorted(values.keys() & {"router", "expert"}):
        if not isinstance(values[part], dict) or "class_path" not in values[part]:
            raise ValueError(f"its model.init_args.moe.{part} has no class_path")
        class_path = str(values[part]["class_path"])
        try:  # a class is registered when its module is imported
            importlib.import_module(class_path.rpartition(".")[0] or "core")
        except ImportError as error:
            raise ValueError(f"{class_path}: {error}") from None
    return values


def with_router(moe: Layers, name: str) -> Layers:
    """Return ``moe`` with the overlay over it; a multi-gate layer gets the router for its gates.

    If the router differs, balance weights that the overlay does not set are the defaults.

    Raises:
        ValueError: the overlay sets something else, or its values do not fit ``moe``.
    """
    import core

    plain = moe.to_dict()
    values = layer_fields(name)
    if "router" in values:
        values = {"balance": {}, **values}
    if isinstance(moe, core.MoEConfig):
        return core.MoEConfig.from_dict({**plain, **values})
    return core.MultiGateConfig.from_dict({**plain, "init_args": {**plain["init_args"], **values}})


@dataclass(frozen=True)
class Variant:
    """Rebuilds a model with another router at equal active FLOPs; unlike a closure, it pickles."""

    model: Comparison
    name: str

    def config(self) -> Layers:
        """Return the layers with the router, and with experts as wide as makes a token cost the same.

        If the routed experts have no hidden dim, as low-rank adapters have none, the shared ones are widened.

        Raises:
            ValueError: the overlay does not fit the layers, or none of the experts has a hidden dim.
        """
        import core
        from core.convert import has_width, nearest_width, widened

        layers = self.model.routed_layers()
        assert layers is not None
        assert not isinstance(layers.config, Sequence)
        moe = with_router(layers.config, self.name)
        parts = getattr(moe, "granularity", 1)  # it has to divide the width

        def at(width: int) -> Layers:
            if isinstance(moe, core.MoEConfig) and moe.shared_expert is not None and not has_width(moe.expert):
                return dataclasses.replace(moe, shared_expert=widened(moe.shared_expert, width))
            return dataclasses.replace(moe, expert=widened(moe.expert, width * parts))

        def cost(width: int) -> float:
            return at(width).flops_per_token(layers.dim, **layers.flops_arguments)

        return at(nearest_width(cost, layers.flops_per_token()))

    def __call__(self) -> Any:
        return self.model.with_moe(self.config())


def variants(model: Comparison, names: Iterable[str]) -> Mapping[str, Baseline]:
    """Return the routers as systems to compare ``model`` with; those that cannot be built say why.

    Raises:
        ValueError: two overlays share a name, or the module has no layer whose router could be another.
    """
    from apps.equal_cost.comparison import Baseline
    from apps.nets.place import misfit

    names, layers = list(names), model.routed_layers()
    if not names:
        return {}
    if layers is None:
        raise ValueError(f"--routers {names[0]}: {type(model.module).__name__} has no layer to put it into")
    if isinstance(layers.config, Sequence):
        raise ValueError(
            f"--routers {names[0]}: moe lists {len(layers.config)} layers; routers are compared where all are one"
        )
    if not hasattr(layers.config, "router"):
        kind = type(layers.config).__name__
        raise ValueError(f"--routers {names[0]}: {kind} takes no router in place of its gates, MMoE does")
    systems: dict[str, Baseline] = {}
    for system, name in by_system(names).items():
        variant = Variant(model, name)
        try:
            config: Any = variant.config()
            problem = misfit(layers.place, config.router, config.balance)
        except ValueError as error:
            problem = str(error)
        if problem:
            systems[system] = Baseline(None, problem)
            continue
        systems[system] = Baseline(variant, _description(config, layers.dim))
    return systems


def _description(config: Any, dim: int) -> str:
    """Return the kinds of router and experts, and the hidden width that was chosen."""
    from core.convert import has_width, hidden_width

    kinds = f"{type(config.router).__name__}, {type(config.expert).__name__}"
    if not has_width(config.expert):
        return f"{kinds}, shared expert hidden {hidden_width(config.shared_expert)}"
    parts = getattr(config, "granularity", 1)
    expert = config.expert if parts == 1 else config.expert.narrowed(parts, dim)
    return f"{kinds}, expert hidden {hidden_width(expert)}"
