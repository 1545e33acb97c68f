"""Models of transformers, adopted in place: the same logits, gradients and texts, from the kernels of this engine."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import core
from core.adopted import LAYOUTS, Layout, adopt, register_layout, release

transformers = pytest.importorskip("transformers")
SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "qk_nope_head_dim": 4,
}
EIGHT = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 12, "first_k_dense_replace": 1}
LOCAL, FOUR = {"num_local_experts": 4}, {"num_experts": 4, "moe_intermediate_size": 12}
SHARED = {"shared_expert_intermediate_size": 12, "decoder_sparse_step": 1}
ONE_SHARED = {"num_shared_experts": 1, "head_dim": 4}
LINEAR = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
FAMILIES = {
    "Mixtral": LOCAL | {"router_jitter_noise": 0.1},
    "Qwen2Moe": FOUR | SHARED,
    "Qwen3Moe": FOUR | {"head_dim": 4},
    "Qwen3Next": FOUR | SHARED | {"head_dim": 4} | LINEAR,
    "Olmoe": {"num_experts": 4},
    "GptOss": LOCAL | {"head_dim": 8, "sliding_window": 8},
    "DeepseekV2": EIGHT | LATENT | {"topk_method": "group_limited_greedy"},
    "DeepseekV3": EIGHT | LATENT,
    "Glm4Moe": EIGHT | {"head_dim": 4},
    "GraniteMoe": LOCAL,
    "Phimoe": LOCAL,
    "Llama4": LOCAL
    | {"intermediate_size_mlp": 24, "head_dim": 4, "interleave_moe_layer_step": 1, "attention_chunk_size": 8},
    "Lfm2Moe": FOUR | {"num_dense_layers": 0, "layer_types": ["conv", "full_attention"]},
    "MiniMaxM2": LOCAL | {"head_dim": 4, "rotary_dim": 4},
    "HunYuanMoEV1": {"num_experts": 4, "moe_topk": 2, "head_dim": 4},
    "Ernie4_5_Moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_intermediate_size": 12,
        "moe_layer_start_index": 0,
    },
    "DeepseekV4": {
        "num_key_value_heads": 1,
        "moe_intermediate_size": 12,
        "n_routed_experts": 4,
        "num_local_experts": 4,
        "head_dim": 8,
        "q_lora_rank": 8,
        "o_lora_rank": 8,
        "o_groups": 2,
        "qk_rope_head_dim": 4,
        "num_hash_layers": 1,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_topk": 4,
        "sliding_window": 8,
    },
    "JetMoe": LOCAL | {"kv_channels": 4},
    "FlexOlmo": {"num_experts": 4},
    "Mellum": FOUR | {"head_dim": 4},
    "MiniMax": LOCAL | {"head_dim": 4, "block_size": 4, "layer_types": ["linear_attention", "full_attention"]},
    "Mistral4": EIGHT | LATENT,
    "Qwen3_5Moe": FOUR | SHARED | {"head_dim": 8} | LINEAR,
    "GraniteMoeShared": LOCAL | {"shared_intermediate_size": 12},
    "GraniteMoeHybrid": LOCAL
    | {
        "shared_intermediate_size": 12,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 4,
        "mamba_chunk_size": 4,
    },
    "Jamba": {
        "num_experts": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "BailingHybrid": EIGHT | LATENT | {"layer_group_size": 2},
    "KimiLinear": EIGHT
    | LATENT
    | {"layer_types": ["linear_attention", "full_attention"], "linear_head_dim": 4, "linear_num_heads": 4},
    "DeepseekV32": EIGHT | LATENT,
    "Glm4MoeLite": EIGHT | LATENT,
    "GlmMoeDsa": EIGHT | LATENT,
    "Dots1": EIGHT | {"n_shared_experts": 1},
    "MiMoV2Flash": EIGHT | {"head_dim": 4},
    "SolarOpen": EIGHT | {"head_dim": 4},
    "ExaoneMoe": FOUR | ONE_SHARED | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "Afmoe": FOUR | ONE_SHARED | {"num_dense_layers": 1},
    "HYV3": FOUR | LOCAL | ONE_SHARED,
    "Laguna": FOUR | SHARED | {"head_dim": 4},
    "Dbrx": {
        "d_model": 16,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 12, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 16},
    },
}
TWO_SIDED = {
    "SwitchTransformers": {
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 12,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "expert_capacity": 4,
        "dropout_rate": 0.0,
        "router_jitter_noise": 0.1,
    },
    "NllbMoe": {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 12,
        "decoder_ffn_dim": 12,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_sparse_step": 1,
        "decoder_sparse_step": 1,
        "expert_capacity": 16,
        "activation_dropout": 0.0,
        "moe_token_dropout": 0.0,
    },
}
"""Encoder-decoders, whose experts are one module each, and may be full."""
DENSE_FIRST = {"DeepseekV2", "DeepseekV3", "Glm4Moe", "Mistral4", "BailingHybrid", "KimiLinear", "DeepseekV32"}
DENSE_FIRST |= {"Glm4MoeLite", "GlmMoeDsa", "Dots1", "MiMoV2Flash", "ExaoneMoe", "Afmoe", "HYV3", "Laguna"}
"""Families whose first layer of two has no experts."""
IDS = torch.tensor([[5, 9, 4, 31, 7, 8, 3], [0, 0, 0, 11, 6, 12, 40]])
MASK = (IDS != 0).long()


def model(name):
    """Return a small model of a family, with weights that spread the tokens over the experts."""
    own = {"num_experts_per_tok": 2, **FAMILIES[name]}
    kind = getattr(transformers, f"{name}{'Text' if name in ('Llama4', 'Qwen3_5Moe') else ''}Config")
    given = own | {"vocab_size": 50} if name == "Dbrx" else SMALL | own
    for option in {"Dbrx": ("num_experts_per_tok",), "JetMoe": ("num_attention_heads",)}.get(name, ()):
        given.pop(option, None)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = kind(**given)
        config._experts_implementation = config._attn_implementation = "eager"
        made = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


def step(net, tape=None):
    """Return logits and gradients of one step, with the same noise each time."""
    net.zero_grad()
    torch.manual_seed(1)
    out = net(input_ids=IDS, attention_mask=MASK, labels=IDS)
    out.loss.backward()
    return out.logits.detach(), {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def error(a, b):
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adopted_model_is_the_model(name):
    plain = model(name)
    adopted = adopt(copy.deepcopy(plain))
    assert list(adopted.state_dict()) == list(plain.state_dict())
    kinds = [type(m).__name__ for m in adopted.modules() if type(m).__name__ != "Module"]  # JetMoE's experts
    assert kinds == [type(m).__name__ for m in plain.modules()]
    layers = core.moe_layers(adopted)
    assert len(layers) == (1 if name in DENSE_FIRST else 2)
    for training in (False, True):
        expected, gradients = step(plain.train(training))
        with core.record(adopted) as tape:
            logits, own = step(adopted.train(training))
        assert error(logits, expected) < 1e-5
        assert own.keys() == gradients.keys()
        for key, gradient in gradients.items():
            assert error(own[key], gradient) < 1e-5 or float((own[key] - gradient).abs().max()) < 1e-8, key
        assert [entry.name for entry in tape.entries] == list(layers)
        for entry in tape.entries:
            assert int(entry.routing.chosen_per_expert_E.sum()) == 2 * int(MASK.sum())  # two experts a real token
            assert entry.routing.evidence.logits_TE.shape == (14, layers[entry.name].num_experts)
            stats = core.RoutingStats.from_tape(tape).layers[entry.name]
            gates = entry.routing.gates_N[MASK.flatten().bool().repeat_interleave(2)]
            assert stats.drop_rate == 0  # padding is computed, and is in no figure
            assert float(stats.gates_per_expert.sum()) == pytest.approx(float(gates.sum()), rel=1e-5)
    texts = [net.eval().generate(IDS[:1], max_new_tokens=4, do_sample=False) for net in (plain, adopted)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("name", FAMILIES)
def test_release_gives_the_blocks_back(name):
    plain = model(name)
    adopted = adopt(copy.deepcopy(plain))
    tensors = [p.data_ptr() for p in adopted.parameters()]
    assert release(adopted) is adopted
    assert not core.moe_layers(adopted)
    assert [p.data_ptr() for p in adopted.parameters()] == tensors
    for before, after in zip(plain.modules(), adopted.modules(), strict=True):
        assert type(after) is type(before)
        assert after.__dict__.keys() == before.__dict__.keys()
    with torch.no_grad():
        plain.eval(), adopted.eval()
        assert torch.equal(adopted(IDS, MASK).logits, plain(IDS, MASK).logits)


def two_sided(name):
    own = {"vocab_size": 50, "num_experts": 4, "decoder_start_token_id": 2, "pad_token_id": 0, **TWO_SIDED[name]}
    rates = {"dropout": 0.0, "attention_dropout": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**own, **(rates if name == "NllbMoe" else {}))
    made = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


def nllb_experts(self, x_TD, chosen_TE, gates_TE):
    """What ``NllbMoeExperts.forward`` should be: it takes the one-hot choice for numbers of experts, 0 and 1."""
    each = torch.stack([self[f"expert_{e}"](x_TD) for e in range(self.num_experts)], 1)
    return (gates_TE[:, :, None] * each).sum(1)


@pytest.mark.parametrize("name", TWO_SIDED)
def test_experts_of_one_module_each_become_stacked_without_a_copy(name, monkeypatch):
    plain = two_sided(name)
    if name == "NllbMoe":
        kind = type(next(m for m in plain.modules() if type(m).__name__ == "NllbMoeExperts"))
        monkeypatch.setattr(kind, "forward", nllb_experts)
    adopted = adopt(copy.deepcopy(plain))
    assert list(adopted.state_dict()) == list(plain.state_dict())
    for training in (False, True):
        expected, gradients = step(plain.train(training))
        with core.record(adopted) as tape:
            logits, own = step(adopted.train(training))
        assert error(logits, expected) < 1e-5
        for key, gradient in gradients.items():
            assert error(own[key], gradient) < 1e-5 or float((own[key] - gradient).abs().max()) < 1e-8, key
        assert all(not own[key].any() for key in own.keys() - gradients.keys())  # experts without tokens
        assert len(tape) == 2
    name = next(name for name in gradients if "expert_" in name)
    with torch.no_grad():
        for net in (plain, adopted):  # the kernels read the parameters themselves
            net.get_parameter(name).add_(1.0)
    changed = step(plain)[0]
    assert error(changed, expected) > 1e-4
    assert error(step(adopted)[0], changed) < 1e-5


def test_an_optimizer_of_before_updates_what_the_experts_compute():
    net = model("Mixtral")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    adopt(net)
    before, _ = step(net)
    optimizer.step()
    after, _ = step(net)
    assert error(after, before) > 1e-2


def test_a_copy_computes_with_its_own_experts():
    net = adopt(model("Mixtral")).eval()
    other = copy.deepcopy(net)
    with torch.no_grad():
        for layer in core.moe_layers(other).values():
            layer.experts.down_proj.zero_()
        assert error(other(IDS).logits, net(IDS).logits) > 1e-2
        assert error(copy.deepcopy(net)(IDS).logits, net(IDS).logits) == 0


def test_balance_losses_reach_the_routers():
    net = adopt(model("Mixtral"), core.Balance(load_balancing_loss=1.0, router_z_loss=0.0)).train()
    with core.record(net) as tape:
        net(IDS, attention_mask=MASK)
    core.aux_loss(tape).backward()
    for layer in core.moe_layers(net).values():
        assert float(layer.router.weight.grad.abs().sum()) > 0
        assert layer.experts.down_proj.grad is None or float(layer.experts.down_proj.grad.abs().sum()) >= 0


class Wrapped(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, batch):
        return self.net(**batch)


def test_padding_is_known_however_the_mask_is_given_and_forgotten_afterwards():
    net, wrapper = adopt(model("Mixtral")), adopt(Wrapped(model("Mixtral")))
    # 14 tokens, 3 of them padding; each takes 2 experts.
    for layers, run, tokens in (
        (net, lambda: net(IDS, MASK), 11),
        (wrapper, lambda: wrapper({"input_ids": IDS, "attention_mask": MASK}), 11),
        (net, lambda: net.model(IDS, attention_mask=MASK), 11),
        (net, lambda: net.model(IDS[:1]), 7),
    ):
        with core.record(layers) as tape:
            run()
        assert [int(e.routing.chosen_per_expert_E.sum()) for e in tape.entries] == [2 * tokens] * 2


def test_two_passes_before_one_backward_may_be_checkpointed():
    nets = [adopt(model("Mixtral")).train() for _ in range(2)]
    nets[1].gradient_checkpointing_enable({"use_reentrant": False})
    grads = []
    for net in nets:
        torch.manual_seed(1)
        first = net(input_ids=IDS, attention_mask=MASK, labels=IDS).loss
        (first + net(input_ids=IDS[:, :4], attention_mask=torch.ones(2, 4), labels=IDS[:, :4]).loss).backward()
        grads.append({n: p.grad for n, p in net.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_a_bias_moves_by_the_loads_if_it_is_given_a_rate():
    for rate in (0.0, 0.25):
        net = adopt(model("DeepseekV3"), bias_update_rate=rate).train()
        bias = net.model.layers[1].mlp.gate.e_score_correction_bias
        before = bias.clone()
        with core.record(net) as tape:
            net(IDS)
        core.update_expert_bias(net, tape)
        load = tape.entries[0].routing.chosen_per_expert_E.float()
        assert torch.equal(bias, before + rate * torch.sign(load.mean() - load))


def test_a_block_that_is_not_known_is_rejected_by_name():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.experts = nn.Linear(4, 2), nn.Linear(4, 4)

    with pytest.raises(ValueError, match="'0', a Odd, has experts and no known layout"):
        adopt(nn.Sequential(Odd()))
    with pytest.raises(ValueError, match="Linear has no MoE block of a known layout"):
        adopt(nn.Linear(2, 2))
    net = adopt(model("Mixtral"))
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp' is adopted already"):
        adopt(net)


def test_a_layout_that_does_not_fit_leaves_the_model_as_it_was(monkeypatch):
    net = model("Mixtral")
    with pytest.raises(ValueError, match="MixtralSparseMoeBlock is registered already"):
        register_layout("MixtralSparseMoeBlock", Layout())
    monkeypatch.setitem(LAYOUTS, "MixtralSparseMoeBlock", Layout(up="wi"))
    with pytest.raises(ValueError, match=r"experts of block 'model\.layers\.0\.mlp', MixtralExperts, have no 'wi'"):
        adopt(net)
    assert not core.moe_layers(net)
    net.model.layers[0].mlp.experts.act_fn = nn.Tanh()
    monkeypatch.setitem(LAYOUTS, "MixtralSparseMoeBlock", Layout())
    with pytest.raises(ValueError, match="activation Tanh, which no kernel has"):
        adopt(net)
    assert not core.moe_layers(net)


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_every_token_through_each_expert_is_what_the_block_computes_of_one(name):
    layer = next(iter(core.moe_layers(adopt(model(name))).values()))
    layer.__dict__["leading"], x_TD = (5,), torch.randn(5, 16)
    with torch.no_grad():
        each_TED = layer.experts(x_TD, "each")
        for e in range(layer.num_experts):
            one_TD = layer.experts(x_TD, torch.full((5, 1), e), torch.ones(5, 1))
            assert error(each_TED[:, e], one_TD) < 1e-6
