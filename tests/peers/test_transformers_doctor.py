"""The diagnosis of models of transformers: their routers are known by the logits that they record."""

from __future__ import annotations

import pytest
import torch

import core

transformers = pytest.importorskip("transformers", minversion="5.0")

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
MODELS = {
    "Mixtral": {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "Olmoe": {"intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
}


def model_and_batches(name="Mixtral", output_router_logits=True):
    """A small model with large gates, so that tokens differ, and batches of 8 sentences whose last third is padding."""
    torch.manual_seed(0)
    options = {**SIZES, **MODELS[name], "output_router_logits": output_router_logits, "router_aux_loss_coef": 0.1}
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**options))
    for parameter_name, p in model.named_parameters():
        if parameter_name.endswith("gate.weight"):
            torch.nn.init.normal_(p, std=0.5)
    draw, batches = torch.Generator().manual_seed(0), []
    for _ in range(2):
        ids = torch.randint(2, 40, (8, 12), generator=draw)
        mask = torch.ones_like(ids)
        ids[:, 8:], mask[:, 8:] = 0, 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return model, batches


def loss(model, batch):
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return model(**batch, labels=labels).loss


def unmasked(model, batch):
    """The balance loss is over padding where the model does not know it."""
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return model(input_ids=batch["input_ids"], labels=labels).loss


@pytest.mark.parametrize("name", MODELS)
def test_a_healthy_model(name):
    model, batches = model_and_batches(name)
    assert core.diagnose(model, batches, loss=loss) == []


def test_a_balance_loss_that_nobody_asked_for():
    model, batches = model_and_batches(output_router_logits=False)
    findings = core.diagnose(model, batches, loss=loss)
    assert [(f.name, f.layer) for f in findings] == [("silent_balance", f"model.layers.{i}.mlp") for i in (0, 1)]
    assert model.router_aux_loss_coef == model.config.router_aux_loss_coef == 0.1


def test_a_balance_loss_over_padding():
    model, batches = model_and_batches()
    assert {f.name for f in core.diagnose(model, batches, loss=unmasked)} == {"balance_over_padding"}


def test_dead_and_equal_experts():
    model, batches = model_and_batches()
    block = model.model.layers[0].mlp
    with torch.no_grad():
        block.gate.weight[1] = block.gate.weight[0]  # of equal logits the first goes first, the other second
        block.experts.gate_up_proj[1], block.experts.down_proj[1] = (
            block.experts.gate_up_proj[0],
            block.experts.down_proj[0],
        )
    (same,) = core.diagnose(model, batches)
    assert (same.name, same.layer, same.figures["pairs"]) == ("same_experts", "model.layers.0.mlp", 1)
