"""What ``HubCausalLM`` is compared with: the other ways of tuning the same model."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import core
from apps.equal_cost.comparison import Baseline, Comparison, ExampleValues
from apps.hub.module import LoRAConfig
from apps.train.step.module import TaskOutput
from apps.train.step.pieces import ratio_values


class HubComparison(Comparison):
    """A ``HubCausalLM`` as a comparison sees it."""

    @property
    def heading(self) -> str:
        """Return the name of the way of tuning in tables."""
        way = "full" if self.module.lora is None else "QLoRA" if self.module.quantize else "LoRA"
        return f"{way}, router frozen" if "router" in self.module.freeze else way

    def baselines(self) -> Mapping[str, Baseline]:
        """Return the other ways of tuning the same model: full, LoRA, QLoRA, and with a frozen router or not."""
        lora = self.module.lora or LoRAConfig()
        routed = LoRAConfig(lora.rank, lora.alpha, (*lora.modules, *({"router"} - {*lora.modules})))
        whole = {"lora": None, "quantize": None, "dtype": self.module.dtype_of_weights or "float32"}
        ways: dict[str, dict[str, Any]] = {
            "full": {**whole, "freeze": ()},
            "full_router_frozen": {**whole, "freeze": ("router",)},
            "lora": {"lora": lora, "quantize": None, "freeze": ()},
            "lora_of_router_too": {"lora": routed, "quantize": None, "freeze": ()},
            "qlora": {"lora": lora, "quantize": self.module.quantize or "int4", "freeze": ()},
        }
        own = {"lora": self.module.lora, "quantize": self.module.quantize, "freeze": self.module.freeze}
        own |= {"dtype": whole["dtype"]} if self.module.lora is None else {}
        notes = {name: f"the same model, tuned another way: {name.replace('_', ' ')}" for name in ways}
        made = {
            name: Baseline(functools.partial(self.module.twin, **way), notes[name])
            for name, way in ways.items()
            if way != own
        }
        fewest = min((layer.router.num_experts for layer in core.moe_layers(self.module.model).values()), default=0)  # type: ignore[type-var]
        if lora.rank > fewest:  # type: ignore[operator]
            made["lora_of_router_too"] = Baseline(None, f"rank={lora.rank} exceeds the router's {fewest} experts")
        return made

    def example_values(self, outs: Sequence[TaskOutput]) -> ExampleValues:
        rows = [row for out in outs for row in out.outputs]
        nats_N, tokens_N = torch.tensor([(row.nll, row.tokens) for row in rows], dtype=torch.float64).unbind(1)
        return ExampleValues("nats_per_token", ratio_values(nats_N, tokens_N), higher_is_better=False)


COMPARISON = HubComparison
