"""A config of every router of the tree that makes pairs, for layers of a kind of their own."""

from __future__ import annotations

from dataclasses import MISSING, fields

from core import ProductKeys, RouterConfig, TokenChoice, TokenRounding

NEEDED = {"vocab_size": 7, "num_tasks": 3, "num_domains": 8}


def by_default(base: type = RouterConfig) -> dict[str, RouterConfig]:
    """Return a config of each kind with the options that it has by default, by its name."""
    configs: dict[str, RouterConfig] = {}
    for kind in base.__subclasses__():
        configs |= by_default(kind)
        if kind.__module__.startswith("core.") and hasattr(kind, "router_class"):
            config = kind(**{f.name: NEEDED[f.name] for f in fields(kind) if f.default is MISSING})
            # The tile of TokenRounding is more than these tokens, and ProductKeys asks for a square number of experts.
            if config.layer_kind == "pairs" and kind not in (TokenRounding, ProductKeys):
                configs[kind.__name__] = config
    return configs


PAIR_ROUTERS = by_default() | {
    "gates on the input": TokenChoice(2, score_func="sigmoid", gates_on="input"),
    "deepseek": TokenChoice(3, score_func="sigmoid", expert_bias=True),
    "small tiles": TokenRounding(tile=4),
}
"""They choose among 8 experts."""
