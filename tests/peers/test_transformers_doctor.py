"""The diagnosis of models of transformers: their routers are known by the logits that they record."""

from __future__ import annotations

import pytest
import torch

import core

transformers = pytest.importorskip("transformers", minversion="5.0")

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "Mixtral": {"intermediate_size": 24, "num_local_experts": 4},
    "Qwen3Moe": {"moe_intermediate_size": 24, "num_experts": 4, "head_dim": 8},
    "Olmoe": {"intermediate_size": 24, "num_experts": 4},
}


def model_and_batches(name="Mixtral", output_router_logits=True):
    """A small model with large gates, so that tokens differ, and batches of 8 sentences whose last third is padding."""
    options = {**SIZES, **MODELS[name], "num_key_value_heads": 2, "num_experts_per_tok": 2}
    options |= {"output_router_logits": output_router_logits, "router_aux_loss_coef": 0.1}
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**options))
    for parameter_name, p in model.named_parameters():
        if parameter_name.endswith("gate.weight"):
            torch.nn.init.normal_(p, std=0.5)
    draw, mask = torch.Generator().manual_seed(0), (torch.arange(12) < 8).long().expand(8, 12)
    batches = [torch.randint(2, 40, (8, 12), generator=draw) * mask for _ in range(2)]
    return model, [{"input_ids": ids, "attention_mask": mask} for ids in batches]


def loss(model, batch, knows_mask=True):
    given = batch if knows_mask else {"input_ids": batch["input_ids"]}
    return model(**given, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss


@pytest.mark.parametrize("name", MODELS)
def test_a_healthy_model(name):
    model, batches = model_and_batches(name)
    assert core.diagnose(model, batches, loss=loss) == []


def test_a_balance_loss_that_nobody_asked_for():
    model, batches = model_and_batches(output_router_logits=False)
    findings = core.diagnose(model, batches, loss=loss)
    assert [(f.name, f.layer) for f in findings] == [("silent_balance", f"model.layers.{i}.mlp") for i in (0, 1)]
    assert model.router_aux_loss_coef == model.config.router_aux_loss_coef == 0.1


def test_a_balance_loss_over_padding_where_the_model_does_not_know_it():
    model, batches = model_and_batches()
    findings = core.diagnose(model, batches, loss=lambda model, batch: loss(model, batch, knows_mask=False))
    assert {f.name for f in findings} == {"balance_over_padding"}


@torch.no_grad()
def test_dead_and_equal_experts():
    model, batches = model_and_batches()
    block = model.model.layers[0].mlp
    # Of equal logits the first goes first, the other second.
    for weight in (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj):
        weight[1] = weight[0]
    (same,) = core.diagnose(model, batches)
    assert (same.name, same.layer, same.figures["pairs"]) == ("same_experts", "model.layers.0.mlp", 1)
