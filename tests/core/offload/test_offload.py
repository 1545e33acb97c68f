"""Offloaded experts: the same output from a few slots, what is counted, and what is refused."""

import copy
import io
import json
import os
import struct
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import core
from core import FFN, IA3, MLP, PEER, ExpertConfig, GeneralFFN, LoRA, Mixed, MoEConfig, ProductKeys, SwiGLU, TokenChoice
from core.offload import loading_experts, offloadable_bytes, unloaded_experts
from core.offload.slots import Expert, SlotPool
from core.offload.statistics import OffloadStatistics
from core.offload.stores import HostStore

E, D, F = 8, 64, 64
"""Widths that are multiples of 64: torch computes the end of a tensor by other instructions, with other roundings, and
with other widths a row's place decides whether it has a part of that end."""

EXACT: dict[str, ExpertConfig] = {
    "FFN": FFN(F),
    "FFN with bias": FFN(F, "relu", bias=True),
    "SwiGLU": SwiGLU(F),
    "GEGLU with bias": core.GEGLU(F, bias=True),
    "clamped": core.ClampedSwiGLU(F, bias=True, limit=1.0, alpha=1.702, shift=1.0),
    "general": GeneralFFN(F, "quick_gelu", gated=True, bias_gate=True, bias_out=False, dropout=0.2),
    "MLP, layer norm": MLP((F,), norm="layer"),
    "MLP, batch norm": MLP((F, F), norm="batch"),
    "LoRA": LoRA(4),
    "constant": core.Constant(mix=True),
    "convolution": core.Convolution(64, columns=2, bias=True),
    "attention": core.AttentionExperts(16, 2),
    "mixed": Mixed((FFN(F), core.Zero(), SwiGLU(32), core.Identity()), (4, 1, 2, 1)),
}
ROUNDED: dict[str, ExpertConfig] = {
    "LoRA, scaled": LoRA(4, alpha=6.0),
    "IA3": IA3(),
    "PEER": PEER(),
    "mixed, low rank": Mixed((LoRA(2, alpha=3.0), IA3()), (4, 4)),
}
"""Kinds that sum gates before they compute: their rows by themselves round differently."""


def layer_of(expert: ExpertConfig | None = None, top_k: int = 3, seed: int = 0, **options: object) -> core.MoELayer:
    torch.manual_seed(seed)
    layer = MoEConfig(E, TokenChoice(top_k), expert or FFN(F), **options).build(D).eval()  # type: ignore[arg-type]
    for tensor in (*layer.parameters(), *layer.buffers()):
        nn.init.uniform_(tensor, 0.1, 1.0) if tensor.ndim < 3 else nn.init.normal_(tensor, std=D**-0.5)
    return layer.requires_grad_(False)


def loaded(config: MoEConfig, state: Mapping[str, Tensor]) -> core.MoELayer:
    """Return a layer with the values of a state dict, whose experts had no memory before."""
    with unloaded_experts():
        layer = config.build(D).eval()
    with loading_experts(layer, state) as rest:
        layer.load_state_dict(rest)
    return layer.requires_grad_(False)


def one_expert(layer: nn.Module) -> int:
    return offloadable_bytes(layer) // E


def passes(layer: nn.Module, count: int = 3) -> list[Tensor]:
    """Return the outputs for tokens of which each pass has others, so that slots change hands."""
    torch.manual_seed(1)
    return [layer(torch.randn(2, 4, D)) for _ in range(count)]


# ---- the same output


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("name", [*EXACT, *ROUNDED])
def test_the_output_is_that_of_resident_experts(name: str, in_file: bool, tmp_path: Path):
    expert = {**EXACT, **ROUNDED}[name]
    layer = layer_of(expert)
    expected = passes(layer)
    if in_file:
        layer = loaded(MoEConfig(E, TokenChoice(3), expert), layer.state_dict())
    # Mixed kinds have a pool a shape, and half of the bytes is enough for a slot of each.
    path = tmp_path / "experts.safetensors" if in_file else None
    offloaded = core.offload_experts(layer, offloadable_bytes(layer) // 2, path)
    assert 0 < offloaded.num_slots < offloaded.num_experts
    for y, wanted in zip(passes(layer), expected, strict=True):
        if name in EXACT:
            assert torch.equal(y, wanted)
        torch.testing.assert_close(y, wanted, rtol=2e-6, atol=2e-6)
    assert offloaded.statistics.misses > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", ["cpu", "eager", "grouped"])
def test_one_slot_is_enough_on_every_backend_and_in_every_dtype(backend: str, dtype: torch.dtype):
    layer = layer_of(SwiGLU(F)).to(dtype)
    layer.backend = backend
    x = torch.randn(2, 4, D, dtype=dtype)
    expected, offloaded = layer(x), core.offload_experts(layer, one_expert(layer))
    assert offloaded.num_slots == 1
    if backend == "grouped":  # it sums in another order
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=0.02 if dtype == torch.bfloat16 else 1e-6)
    else:
        assert torch.equal(layer(x), expected)


def test_experts_that_fit_the_slots_are_computed_at_once_and_padding_is_none():
    layer, x = layer_of(), torch.randn(1, 1, D)
    expected, offloaded = layer(x), core.offload_experts(layer, 3 * one_expert(layer))
    for hits in (0, 3):
        assert torch.equal(layer(x), expected)
        assert (offloaded.statistics.hits, offloaded.statistics.misses) == (hits, 3)
    layer = layer_of()
    x, valid_BS = torch.randn(2, 4, D), torch.tensor([[True, True, False, False], [False] * 4])
    x[~valid_BS] = float("nan")
    contexts = [core.RoutingContext(valid_BS), core.RoutingContext(torch.zeros_like(valid_BS))]
    expected = [layer(x, context) for context in contexts]
    core.offload_experts(layer, 2 * one_expert(layer))
    for context, wanted in zip(contexts, expected, strict=True):
        assert torch.equal(layer(x, context), wanted)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_experts(bits: int, tmp_path: Path):
    layer = core.quantize_experts(layer_of(SwiGLU(F)), bits, group_size=32)
    expected = passes(layer)
    offloaded = core.offload_experts(layer, one_expert(layer) * 4, tmp_path / "experts.safetensors")
    assert offloaded.num_slots == 4
    assert all(torch.equal(y, wanted) for y, wanted in zip(passes(layer), expected, strict=True))


@pytest.mark.parametrize(
    "config",
    [
        MoEConfig(E, core.SoftSlots(slots_per_expert=2), FFN(F)),
        MoEConfig(E, core.ExpertChoice(capacity_factor=2.0), FFN(F), num_shared_experts=1),
        MoEConfig(E, TokenChoice(2, gates_on="input"), FFN(F)),
        MoEConfig(E, core.Hash(100), FFN(F)),
        MoEConfig(16, ProductKeys(top_k=2, heads=2), PEER()),
    ],
    ids=["soft slots", "expert choice", "gates on the input", "hash", "product keys"],
)
def test_other_routers(config: MoEConfig):
    layer, x = config.build(D).eval().requires_grad_(False), torch.randn(2, 4, D)
    ids = core.RoutingContext(token_ids_BS=torch.arange(8).view(2, 4))
    expected = layer(x, ids)
    core.offload_experts(layer, offloadable_bytes(layer) // 2)
    torch.testing.assert_close(layer(x, ids), expected, rtol=1e-6, atol=1e-6)


def two_layers() -> nn.Sequential:
    return nn.Sequential(layer_of(top_k=1), nn.Tanh(), layer_of(top_k=1, seed=5))


def test_layers_of_equal_shapes_share_a_pool_and_those_that_take_all_experts_stay_as_they_are():
    model, x = two_layers(), torch.randn(1, 4, D)
    expected = model(x)
    offloaded = core.offload_experts(model, 5 * one_expert(model[0]), prefetch=False)
    assert torch.equal(model(x), expected)
    assert (offloaded.num_slots, offloaded.num_experts) == (5, 16)
    assert (offloaded.slot_bytes, [*offloaded.by_module()]) == (5 * one_expert(model[0]), ["0.experts", "2.experts"])
    total = offloaded.statistics
    assert total.needed == sum(part.needed for part in offloaded.by_module().values())
    assert total.bytes_moved == total.misses * one_expert(model[0])
    model = nn.Sequential(MoEConfig(4, core.Merge(), FFN(F)).build(D), layer_of()).eval().requires_grad_(False)
    offloaded = core.offload_experts(model, one_expert(model[1]))
    assert (offloaded.left, [*offloaded.by_module()]) == (["0.experts"], ["1.experts"])


def test_calls_from_several_threads():
    layer, inputs = layer_of(), [torch.randn(1, 4, D) for _ in range(8)]
    expected = [layer(x) for x in inputs]
    core.offload_experts(layer, 2 * one_expert(layer))

    def is_same(i: int) -> bool:
        return all(torch.equal(layer(inputs[i]), expected[i]) for _ in range(5))

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(is_same, range(8))) == [True] * 8


# ---- experts that are loaded where they are kept


def test_experts_without_memory_take_the_tensors_of_the_state():
    state = layer_of(FFN(F, bias=True)).state_dict()
    layer = loaded(MoEConfig(E, TokenChoice(3), FFN(F, bias=True)), state)
    own = layer.state_dict()
    assert all(torch.equal(own[name], value) for name, value in state.items())
    same = {name for name, value in state.items() if own[name].data_ptr() == value.data_ptr()}
    assert same == {f"experts.{name}" for name in ("w_in", "w_out", "b_in", "b_out")}
    # A layer that merges its experts is not offloaded: nothing of it stays in the state's memory.
    merging = MoEConfig(E, core.Merge(), FFN(F))
    state = merging.build(D).state_dict()
    own = loaded(merging, state).state_dict()
    assert all(torch.equal(own[name], v) and own[name].data_ptr() != v.data_ptr() for name, v in state.items())
    # A checkpoint in another dtype is loaded in the dtype of the layer.
    config, state = MoEConfig(E, TokenChoice(3), FFN(F)), layer_of().state_dict()
    layer = loaded(config, {name: value.double() for name, value in state.items()})
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


class Remembering(core.experts.FFNExperts):
    """Has numbers that no checkpoint keeps."""

    def __init__(self, config: FFN, num_experts: int, dim: int, out_dim: int) -> None:
        super().__init__(config, num_experts, dim, out_dim)
        self.register_buffer("memory", torch.ones(num_experts), persistent=False)


class RememberingFFN(FFN):
    experts_class = Remembering


def test_values_that_the_checkpoint_lacks_are_named():
    config, state = MoEConfig(E, TokenChoice(3), FFN(F)), layer_of().state_dict()
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "experts.w_in"'):
        loaded(config, {name: value for name, value in state.items() if name != "experts.w_in"})
    with pytest.raises(RuntimeError, match=r"size mismatch for experts.w_in: .*\[4, 64, 64\]"):
        loaded(config, {**state, "experts.w_in": state["experts.w_in"][:4]})
    with unloaded_experts():
        layer = config.build(D)
    some = {"experts.w_in": state["experts.w_in"]}
    lacking = r"^experts.w_out of shape \(8, 64, 64\) has no memory, and the state has no"
    with pytest.raises(ValueError, match=lacking), loading_experts(layer, some) as rest:
        layer.load_state_dict(rest, strict=False)
    with pytest.raises(ValueError, match=r"^experts.memory of shape \(8,\) has no memory"):
        loaded(MoEConfig(E, TokenChoice(3), RememberingFFN(F)), state)


# ---- which experts are there


def pool_of(policy: str, slots: int, num_experts: int = 4) -> tuple[SlotPool, OffloadStatistics]:
    store = HostStore({"w": torch.arange(1.0, num_experts + 1)[:, None]}, pinned=False)
    shapes = {"w": (torch.Size([1]), torch.float32)}
    return SlotPool(shapes, slots, torch.device("cpu"), policy, {0: store}), OffloadStatistics()


@pytest.mark.parametrize(
    ("policy", "needed", "kept"),
    [
        ("lru", (0, 0, 0, 1, 2), {1, 2}),  # 2 takes the slot of 0, which was used longest ago
        ("lfru", (0, 0, 0, 1, 2), {0, 2}),  # of 1, which has the fewest uses
        ("lfru", (0, 0, *[1] * 40, 2), {1, 2}),  # uses fade: two 40 calls ago are worth less than one of now
    ],
)
def test_a_slot_is_taken_from_the_expert_of_the_least_use(policy, needed, kept):
    pool, counted = pool_of(policy, 2)
    for number in needed:
        pool.require(0, [number], counted)
    assert {expert.number for expert in pool.resident} == kept
    assert (counted.misses, counted.bytes_moved) == (3, 3 * 4)
    assert counted.hits == len(needed) - 3


def test_a_slot_holds_the_expert_that_was_asked_for_and_one_on_its_way_is_a_foreseen_miss():
    pool, counted = pool_of("lru", 2)
    for numbers in ([0, 1], [2], [3, 0], [1]):
        slots = pool.require(0, numbers, counted)
        assert [pool.tensors["w"][slot].item() for slot in slots] == [number + 1 for number in numbers]
    # 2 uses at the calls 1 and 2 are 2^(-40/16) + 2^(-41/16) at call 42.
    pool, counted = pool_of("lfru", 2)
    for number in (0, 0, *[1] * 40):
        pool.require(0, [number], counted)
    (value, _) = pool._value(next(expert for expert in pool.resident if expert.number == 0))
    assert value == pytest.approx(2 ** (-40 / 16) + 2 ** (-41 / 16))
    pool, counted = pool_of("lfru", 3)
    pool.require(0, [0], counted)
    pool.prefetch([Expert(0, 1)], [], Worker(False), counted)  # type: ignore[arg-type]
    slots = pool.require(0, [0, 1, 2], counted)
    assert [pool.tensors["w"][slot].item() for slot in slots] == [1, 2, 3]
    # Of four needed experts 0 was there once, and 1 was on its way.
    assert (counted.hits, counted.misses, counted.late) == (1, 3, 1)
    assert (counted.hit_rate, counted.foreseen_rate) == (0.25, 0.5)


class Worker:
    """Has done its work when it is asked, or is not given a processor."""

    def __init__(self, at_once: bool) -> None:
        self.at_once = at_once

    def submit(self, fn: Callable[..., None], *args: object) -> None:
        if self.at_once:
            fn(*args)


def alternating(prefetch: bool) -> OffloadStatistics:
    """Return what is counted where two layers take turns, each with an expert that depends on the token, in 4 slots."""
    model = two_layers()
    offloaded = core.offload_experts(model, 4 * one_expert(model[0]), prefetch=prefetch)
    offloaded._worker = Worker(True)  # type: ignore[assignment]
    torch.manual_seed(3)
    tokens = torch.randn(6, 1, 1, D)
    for i in torch.randint(6, (60,)).tolist():
        model(tokens[i])
    return offloaded.statistics


def test_prefetching_raises_the_hit_rate():
    without, ahead = alternating(False), alternating(True)
    assert without.needed == ahead.needed == 120
    assert without.prefetched == without.unused == without.late == 0
    assert ahead.prefetched > 0
    assert ahead.hit_rate > without.hit_rate + 0.1
    size = 2 * D * F * 4
    assert without.bytes_moved == without.misses * size
    assert ahead.bytes_moved == (ahead.misses - ahead.late + ahead.prefetched) * size


# ---- the model as a whole


def test_the_state_dict_is_complete_and_a_copy_and_a_pickle_have_all_experts_in_memory(tmp_path: Path):
    layer = layer_of(FFN(F, bias=True))
    expected = {name: value.clone() for name, value in layer.state_dict().items()}
    core.offload_experts(layer, one_expert(layer), tmp_path / "experts.safetensors")
    state = layer.state_dict()
    assert [*state] == [*expected]
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert core.active_params(layer) == core.active_params(layer_of(FFN(F, bias=True)))
    with pytest.raises(ValueError, match="take no other weights"):
        layer.load_state_dict(state)
    layer = layer_of()
    expected = passes(layer)
    offloaded = core.offload_experts(layer, one_expert(layer), tmp_path / "others.safetensors")
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert all(torch.equal(y, wanted) for y, wanted in zip(passes(other), expected, strict=True))
    assert offloaded.statistics.needed == 0


def test_the_slots_follow_the_model_and_experts_that_are_changed_in_place_are_fetched_again():
    layer = layer_of()
    core.offload_experts(layer, one_expert(layer))
    x = torch.randn(1, 2, D)
    expected = layer(x)
    assert torch.equal(layer.to("cpu")(x), expected)
    with pytest.raises(ValueError, match=r"stay torch.float32: convert the model before"):
        layer.half()
    model, x = two_layers(), torch.randn(1, 4, D)
    core.offload_experts(model, offloadable_bytes(model) // 2)
    model(x)
    with torch.no_grad():
        model[0].experts.w_in.mul_(2)
        model[2].experts.weights_of(3)["w_out"].add_(1)
    assert torch.equal(model(x), copy.deepcopy(model)(x))


def test_a_file_that_other_programs_read(tmp_path: Path):
    layer = layer_of(FFN(F, bias=True))
    weights = {name: t.clone() for name, t in layer.experts.named_parameters()}
    path = tmp_path / "experts.safetensors"
    core.offload_experts(layer, one_expert(layer), path)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert {name: entry["shape"] for name, entry in header.items()} == {
        f"experts.{name}": [*t.shape] for name, t in weights.items()
    }
    begin, end = header["experts.b_in"]["data_offsets"]
    values = torch.frombuffer(bytearray(data[8 + length + begin : 8 + length + end]), dtype=torch.float32)
    assert torch.equal(values.view(E, F), weights["b_in"])
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


# ---- bad input


def test_experts_that_are_changed_beside_their_store_are_rejected(tmp_path: Path):
    for change, path in (
        (lambda experts: experts.w_in.mul_(2), tmp_path / "experts.safetensors"),
        (lambda experts: setattr(experts.w_in, "data", torch.zeros(E, D, F)), None),
        (lambda experts: setattr(experts, "w_in", nn.Parameter(torch.zeros(E, D, F), requires_grad=False)), None),
    ):
        layer = layer_of()
        core.offload_experts(layer, one_expert(layer), path)
        with torch.no_grad():
            change(layer.experts)
        with pytest.raises(ValueError, match=r"^the experts experts were changed after they were stored: change them"):
            layer(torch.randn(1, 4, D))


def test_adapters_are_chosen_after_offloading_and_neither_added_nor_merged():
    layer = core.add_adapters(layer_of(SwiGLU(F)), LoRA(2), "experts").requires_grad_(False)
    for update in layer.experts.lora["default"].values():
        nn.init.normal_(update.b)
    x = torch.randn(2, 4, D)
    wanted = {names: core.use_adapters(layer, *names)(x) for names in ((), ("default",))}
    assert float((wanted[()] - wanted[("default",)]).abs().max()) > 0.1
    core.offload_experts(layer, 2 * one_expert(layer))
    for names in ((), ("default",), ()):
        torch.testing.assert_close(core.use_adapters(layer, *names)(x), wanted[names], rtol=1e-5, atol=1e-5)
    kind = "FFNExperts are offloaded: adapters are added and merged before core.offload_experts"
    with pytest.raises(ValueError, match=kind):
        core.add_adapters(layer, LoRA(2), "experts", name="second")
    with pytest.raises(ValueError, match=kind):
        core.merge_adapters(layer)
    core.add_adapters(layer, LoRA(2), "router", name="second")  # starts at zero
    torch.testing.assert_close(layer(x), wanted[()], rtol=1e-5, atol=1e-5)


def test_offloaded_experts_become_neither_more_nor_fewer():
    statistics = core.expert_statistics(layer_of(), [torch.randn(2, 4, D)], every_token=True)
    for verb, change in (
        ("shrinks", lambda layer: core.keep_experts(layer, [2, 3, 5])),
        ("shrinks", lambda layer: core.prune_experts(layer, statistics, 4)),
        ("shrinks", lambda layer: core.merge_experts(layer, statistics, 4)),
        ("grows", lambda layer: core.grow_experts(layer, 2)),
    ):
        layer = layer_of()
        expected = passes(layer)
        core.offload_experts(layer, 3 * one_expert(layer))
        with pytest.raises(ValueError, match=f"FFNExperts are offloaded: a layer {verb} before core.offload_experts"):
            change(layer)
        assert all(torch.equal(y, wanted) for y, wanted in zip(passes(layer), expected, strict=True))


@pytest.mark.parametrize(
    ("model", "budget", "options", "message"),
    [
        (nn.Linear(2, 2), 1, {}, "a Linear has no routed experts to offload"),
        (core.MMoE().build(D, 2), 1 << 20, {}, "no routed experts to offload"),
        (layer_of(), 1 << 20, {"policy": "fifo"}, "policy='fifo' is not one of"),
        (layer_of(), 0.5, {}, r"budget_bytes=0\.5 is not an integer"),
        (layer_of(), 2 * D * F * 4 - 1, {}, r"budget_bytes=32767 is below the 32768 bytes of one expert$"),
        (layer_of(Mixed((FFN(F), SwiGLU(F)), (4, 4))), (2 + 3) * D * F * 4 - 1, {},
         "budget_bytes=81919 is below the 81920 bytes of one expert of each of 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_offloaded(model, budget, options, message):
    with pytest.raises(ValueError, match=message):
        core.offload_experts(model, budget, **options)


def test_experts_are_offloaded_once_and_a_folder_has_to_be_there(tmp_path: Path):
    layer = layer_of()
    with pytest.raises(FileNotFoundError):
        core.offload_experts(layer, one_expert(layer), tmp_path / "none" / "experts.safetensors")
    assert layer.experts.cache is None
    core.offload_experts(layer, 1 << 20)
    with pytest.raises(ValueError, match="the experts experts are offloaded already"):
        core.offload_experts(layer, 1 << 20)


def test_training_is_refused_and_a_token_that_picks_more_than_the_slots():
    layer, x = layer_of(GeneralFFN(F, dropout=0.9)), torch.randn(1, 2, D)
    expected = layer(x)
    core.offload_experts(layer.train(), one_expert(layer))
    with pytest.raises(ValueError, match="do not train"):
        layer(x)
    assert torch.equal(layer.eval()(x), expected)
    with pytest.raises(ValueError, match="have no gradients"):
        layer.eval()(x.requires_grad_())
    layer = MoEConfig(16, ProductKeys(top_k=2, heads=2), PEER()).build(D).eval().requires_grad_(False)
    core.offload_experts(layer, offloadable_bytes(layer) // 16)
    with pytest.raises(ValueError, match=r"a token picks \d experts, and the budget holds 1"):
        layer(torch.randn(1, 2, D))


def in_file(tmp_path: Path) -> tuple[core.MoELayer, Tensor, Path]:
    layer, path = layer_of(), tmp_path / "experts.safetensors"
    core.offload_experts(layer, one_expert(layer), path, prefetch=False)
    x = torch.randn(1, 8, D)
    layer(x)
    return layer, x, path


def test_a_file_that_is_touched_or_replaced_is_still_read_and_one_that_is_cut_is_named(tmp_path: Path):
    layer, x, path = in_file(tmp_path)
    expected, size = layer(x), path.stat().st_size
    path.touch()
    assert torch.equal(layer(x), expected)
    kept = path.rename(tmp_path / "kept.safetensors")
    path.write_bytes(b"another")
    assert torch.equal(layer(x), expected)
    os.truncate(kept, size - 4)
    for use in (lambda: layer(x), layer.state_dict, lambda: copy.deepcopy(layer)):
        with pytest.raises(ValueError, match=f"has {size - 4} bytes and had {size}: it was cut under the cache"):
            use()


def test_a_file_that_is_changed_under_the_cache(tmp_path: Path):
    layer, x, path = in_file(tmp_path)
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 0x80]))  # the sign of the last number of the last expert
    wanted = r"was changed under the cache: expert 7 of experts\.w_out is not what was written there"
    for use in (lambda: [layer(x) for _ in range(2)], layer.state_dict):
        with pytest.raises(ValueError, match=wanted):
            use()
