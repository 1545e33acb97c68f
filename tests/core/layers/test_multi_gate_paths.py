"""Every multi-task layer against a loop, in every size and dtype, padded, copied, compiled and exported."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import pytest
import torch
import torch._dynamo
from gated import ALL, DOMAIN, TASKS, D, build, context, examples
from stepped import assert_same, step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core import MLP, MMoE, RoutingContext, TokenChoice, aux_loss, record

KINDS = ["mmoe", "home ple", "domain ple", "m3oe", "star", "top-k", "shared top-k", "relu", "smes", "sparse rank mixer"]

# Fast paths, sizes, dtypes.


@pytest.mark.parametrize("name", ALL)
def test_the_fast_path_equals_the_loop_in_output_and_gradients(name):
    # Float32 sums over 100 examples in another order: up to 2e-4 of gradients around 100.
    for B in (0, 1, 100):
        oracle = build(name, backend="eager")
        fast = build(name)
        assert fast.experts is not oracle.experts
        known = context(name, B)
        assert_same(step(fast, examples(B), known), step(oracle, examples(B), known), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("selection", ["task", "shared"])
@pytest.mark.parametrize("load", ["all on one", "one is empty"])
def test_the_fast_path_equals_the_loop_at_uneven_loads(load, selection):
    layers, B = [], 100
    for backend in ("eager", "auto"):
        config = MMoE(6, MLP((7, 6)), TokenChoice(1 if load == "all on one" else 3), selection, backend=backend)
        torch.manual_seed(0)
        layer = config.build(D, TASKS)
        with torch.no_grad():
            for router in layer.routers().values():
                if load == "all on one":
                    router.gate.weight.copy_(torch.eye(6)[4][:, None] * 20.0)
                else:
                    router.gate.weight[2] = -20.0
        layers.append(layer)
    x = examples(B).abs()
    with record(layers[1]) as tape:
        layers[1](x)
    loads = tape.entries[0].routing.tokens_per_expert_E
    assert loads.tolist() == [0, 0, 0, 0, B, 0] if load == "all on one" else loads[2] == 0
    assert_same(step(layers[1], x), step(layers[0], x), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("name", ALL)
def test_shapes(name):
    layer = build(name).eval()
    width = ALL[name].out_dim(D)
    assert width == (D if "ffn" in name.lower() or "swiglu" in name else 6)
    x = examples(12)
    known = context(name, 12)
    flat = layer(x, known)
    assert flat.shape == (TASKS, 12, width)
    if name not in DOMAIN:  # an id a sequence
        torch.testing.assert_close(layer(x.reshape(3, 4, D)), flat.reshape(TASKS, 3, 4, width), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer(x.reshape(2, 2, 3, D)).flatten(1, 3), flat, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="at least"):
        layer(torch.randn(D), known)


@pytest.mark.parametrize(("name", "training"), [*((name, True) for name in ALL), *((name, False) for name in KINDS)])
def test_padding_may_hold_nan_and_is_zero_and_nowhere(name, training):
    layer = build(name).train(training)
    other = copy.deepcopy(layer)
    valid = torch.tensor([True, True, False, True, False, True, True])
    x = examples(7)
    known = context(name, 7, valid)
    domains = None if known.domain_ids_B is None else known.domain_ids_B[valid]
    if known.domain_ids_B is not None:
        known = RoutingContext(valid, domain_ids_B=known.domain_ids_B.masked_fill(~valid, 99))
    actual = step(layer, x.masked_fill(~valid[:, None], torch.nan), known)
    kept = step(other, x[valid], None if domains is None else RoutingContext(domain_ids_B=domains))
    assert not actual["y"][:, ~valid].any()
    assert not actual["dx"][~valid].any()
    torch.testing.assert_close(actual["aux"], kept["aux"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(actual["y"][:, valid].isfinite(), torch.ones_like(kept["y"], dtype=torch.bool))
    if "null" not in name:
        torch.testing.assert_close(actual["y"][:, valid], kept["y"], rtol=1e-4, atol=1e-5)
    assert all(value.isfinite().all() for value in actual.values())
    assert_same(dict(layer.named_buffers()), dict(other.named_buffers()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_in_half_precision_and_under_autocast_gates_stay_in_float32(name):
    layer = build(name).eval()
    x, known = examples(20), context(name, 20)
    with record(layer) as tape:
        exact = layer(x, known)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x, known)
    assert y.dtype == torch.bfloat16
    half = len(tape) // 2
    for before, cast in zip(tape.entries[:half], tape.entries[half:], strict=True):
        if before.routing.evidence.scores_TE is None:  # a domain's expert is no matter of scores
            continue
        assert cast.routing.evidence.scores_TE.dtype == torch.float32
        if not any(part in cast.name for part in ("level1", "level2", "token")):  # those see inputs in bfloat16
            assert torch.equal(cast.routing.evidence.scores_TE, before.routing.evidence.scores_TE)
    # A few products rounded to 8 bits, 2^-8 each, of the largest output.
    assert (y.float() - exact).abs().max() < 0.05 * exact.abs().max()
    y = layer.bfloat16()(x.bfloat16(), known)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


# State.


@pytest.mark.parametrize("name", ALL)
def test_copies_pickles_and_states_are_the_same_layer(name):
    layer = build(name)
    x, known = examples(6), context(name, 6)
    layer(x, known)  # moves the statistics of batch norm
    layer.eval()
    y = layer(x, known)
    assert torch.equal(copy.deepcopy(layer)(x, known), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x, known), y)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh = build(name, seed=1).eval()
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh(x, known), y)
    with torch.device("meta"):
        empty, bare = build(name).eval(), build(name).eval()
    empty.load_state_dict(layer.state_dict(), assign=True)
    bare.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert torch.equal(empty(x, known), y)
    assert torch.equal(bare(x, known), y)


@pytest.mark.parametrize("name", KINDS)
def test_a_recorded_layer_may_be_repeated_by_a_checkpoint_after_the_tape(name):
    layer, x = build(name), examples(6).requires_grad_()
    other, known = copy.deepcopy(layer), context(name, 6)
    for net, run in ((layer, layer), (other, functools.partial(checkpoint, other, use_reentrant=False))):
        with record(net) as tape:
            y = run(x, known)
        (y.square().mean() + aux_loss(tape)).backward()
    grads, others = ({n: p.grad for n, p in net.named_parameters()} for net in (layer, other))
    assert_same(others, grads)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "name", ["home ple", *(pytest.param(n, marks=pytest.mark.slow) for n in ("smes", "domain mmoe"))]
)
def test_the_compiled_layer_equals_eager(name):
    layer = build(name)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x, known = examples(6), context(name, 6)
    other = copy.deepcopy(layer)
    assert_same(step(layer, x, known, compiled), step(other, x, known), rtol=1e-5, atol=1e-5)
    assert_same(dict(layer.named_buffers()), dict(other.named_buffers()), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "name", ["domain ple", *(pytest.param(n, marks=pytest.mark.slow) for n in ("smes", "home ple"))]
)
def test_the_exported_layer_serves_other_batches(name):
    layer = build(name).eval()
    known = context(name, 6)
    batch = torch.export.Dim("batch", min=1, max=512)
    shapes = {"x": {0: batch}}
    model: nn.Module = layer
    if name in DOMAIN:

        class WithDomains(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = layer

            def forward(self, x: Tensor, domains: Tensor) -> Tensor:
                return self.layer(x, RoutingContext(domain_ids_B=domains))

        model, shapes = WithDomains(), {"x": {0: batch}, "domains": {0: batch}}
    args = (examples(6),) if known is None else (examples(6), known.domain_ids_B)
    program = torch.export.export(model, args, dynamic_shapes=shapes).module()
    for B in (1, 6, 40):
        known = context(name, B)
        args = (examples(B),) if known is None else (examples(B), known.domain_ids_B)
        torch.testing.assert_close(program(*args), layer(examples(B), known), rtol=1e-5, atol=1e-5)
