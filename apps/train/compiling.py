"""``compile`` of a configuration: the networks inside a module are compiled in place; no weight changes its name."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import nn


@dataclass(frozen=True)
class CompileConfig:
    """Options of ``torch.compile``.

    Attributes:
        mode: "default", "reduce-overhead", "max-autotune" or "max-autotune-no-cudagraphs"; None: "default".
        dynamic: True: shapes are dynamic from the start; False: each shape is compiled by itself; None: a size is
            dynamic once it has changed.
        fullgraph: whether code that cannot be one graph is an error.
        backend: the compiler.
    """

    mode: str | None = None
    dynamic: bool | None = None
    fullgraph: bool = False
    backend: str = "inductor"


def compile_networks(module: nn.Module, how: bool | CompileConfig | None) -> str | None:
    """Compile the networks that ``module.compiled_networks`` names, in place, when they first run.

    Args:
        module: a LightningModule; one of the user's own names nothing: its ``model`` is compiled, or else its
            ``forward``.
        how: True: by torch's defaults; False or None: not at all.

    Returns:
        a line that says so; None: nothing is compiled.
    """
    if not how:
        return None
    options = asdict(CompileConfig() if how is True else how)
    own = "model" if isinstance(getattr(module, "model", None), nn.Module) else ""
    names = getattr(module, "compiled_networks", ()) or (own,)
    for part in map(module.get_submodule, names):
        for network in part if isinstance(part, nn.ModuleList) else [part]:  # a list is never called itself
            network.compile(**options)
    shown = ", ".join(f"{key}={value}" for key, value in options.items() if value not in (None, False))
    what = ", ".join(name or type(module).__name__ for name in names)
    return f"compiled: {what} ({shown}); the first step of each shape takes longer"
