"""The changes of each conversion: the model's arguments, and the tensors of some modules, made one module at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

import core
from apps.base.checks import check_name
from apps.cli.configs import read_config
from apps.cli.errors import UsageError
from apps.convert.figures import RunTrial
from apps.convert.runs import Conversion, ConversionRequest, Tensors, TrainedRun, model_section
from apps.nets.blocks import moe_configs
from apps.registry import name_of
from apps.train.cost.quantizing import quantize_model
from apps.train.step.adapted import adapt_linears
from apps.train.step.parts import DataPart
from core.convert import FeedForwardPart, SparseFFN, read_ffn
from core.convert.build.starts import start_of
from core.convert.read.parts import layers_with_experts
from core.convert.reduce.prune import number_to_keep

OneLayer = Callable[[str, core.MoE], Any]
"""Returns the ``OneExpert`` that takes the place of a layer, by the layer's name."""


def check_runs(kind: str, options: Any, runs: Sequence[TrainedRun]) -> None:
    """Check that a kind of conversion takes these runs, before anything is computed.

    Raises:
        UsageError: there is one run to be merged, and it has no adapters.
        ValueError: a run has adapters on its linear layers, which this conversion does not handle.
    """
    adapted = next((run for run in runs if run.is_adapted), None)
    if kind == "merge" and len(runs) == 1:
        if adapted is None:
            raise UsageError(f"--ckpt_path {runs[0].file} is one run: merge takes two or more, or one with adapters")
        if options.how != "average" or options.weights or options.moe:
            raise ValueError(f"--how, --weights and --moe are for several runs, not for {runs[0].file} with adapters")
    elif adapted is not None and kind != "densify":
        raise ValueError(
            f"{adapted.file} has adapters on its linear layers: merge them first, by moesaic convert merge, or "
            "convert the run that was adapted"
        )


def sparse_layers(request: ConversionRequest) -> dict[str, core.MoE]:
    """Return the MoE layers that the argument ``moe`` makes, by name; a head of several gates is none of them.

    Raises:
        ValueError: there are none, they share experts, have several gates, or replace attention.
    """
    run, arguments = request.run, request.run.arguments()
    dense = {**arguments, "moe": None} if "moe" in arguments else arguments
    stay = core.moe_layers(run.outline(dense))
    layers: dict[str, core.MoE] = {}
    for name, layer in layers_with_experts(request.module).items():
        if name in stay:
            continue
        if not isinstance(layer, core.MoE):
            raise ValueError(f"layer {name!r} is a {type(layer).__name__}: core.MoE and its subclasses are converted")
        layers[name] = layer
    if arguments.get("attention_moe") is not None:
        raise ValueError(f"{run.file} has attention_moe, whose experts no conversion changes")
    if arguments.get("moe") is None:
        raise ValueError(f"{run.kind.__name__} has no argument moe that says what its experts are")
    return layers


def one_for_all(request: ConversionRequest) -> OneLayer:
    """Return the function that makes one expert of all experts of a layer, as ``--how`` says."""
    how, statistics = request.options.how, request.statistics
    if how in BY_LOAD and statistics is None:
        raise ValueError(f"--batches 0 leaves out the loads that --how {how} needs")

    def one(name: str, layer: core.MoE) -> nn.Module:
        return core.densify(layer, how, statistics[name].loads_E if statistics and how in BY_LOAD else None)

    return one


def densified(request: ConversionRequest) -> Conversion:
    """Return one feed-forward network that replaces each MoE layer, made of all its experts; of a run with adapters,
    one adapter instead of each mixture of them, as a part of its linear layer."""
    how, statistics, one = request.options.how, request.statistics, one_for_all(request)
    if not request.run.is_adapted:
        return _dense(request, one)

    def of_one_update(name: str, adapted: core.AdaptedLinear) -> core.AdaptedLinear:
        used = statistics[f"{name}.updates"].loads_E if statistics and how in BY_LOAD else None
        core.densify(adapted, how, None if used is None else {"updates": used})
        return adapted

    return _with_updates_merged(request, of_one_update)


def fewer_experts(request: ConversionRequest) -> Callable[[str, core.MoE], Tensors]:
    """Return the function that leaves a layer fewer experts, in place, as the options say."""
    options, statistics = request.options, request.statistics
    constants, merged = bool(getattr(options, "constants", False)), bool(getattr(options, "merge", False))
    if statistics is None and not getattr(options, "without", ()):
        raise ValueError("--batches 0 leaves out the statistics that say which experts stay")

    def fewer(name: str, layer: core.MoE) -> Tensors:
        if statistics is None:  # experts are named
            core.keep_experts(layer, _left(request, layer))
        elif merged:
            core.merge_experts(layer, statistics[name], options.keep)
        else:
            core.prune_experts(layer, statistics[name], options.keep, options.by, constants=constants)
        return layer.state_dict()

    return fewer


def pruned(request: ConversionRequest) -> Conversion:
    """Return fewer experts in each layer: the ones with the highest scores, or clusters of similar ones."""
    layers, fewer = sparse_layers(request), fewer_experts(request)
    arguments = request.run.arguments()
    given, constants = arguments["moe"], bool(getattr(request.options, "constants", False))
    configs = moe_configs(given)
    each = configs if len(configs) > 1 else configs * len(layers)
    smaller = [
        with_fewer(config, layer, keep_of(request, layer), constants)
        for config, layer in zip(each, layers.values(), strict=True)
    ]
    arguments["moe"] = smaller if isinstance(given, list) else smaller[0]
    data, gone = {}, {*getattr(request.options, "without", ())}
    if gone and _domains(request):
        own = request.run.config["data"]["init_args"]["domains"].items()  # type: ignore[index]  # it has domains
        data = {"domains": {name: v for e, (name, v) in enumerate(own) if not gone & {str(e), name}}, "weights": None}
    return Conversion(arguments, {name: partial(fewer, name, layer) for name, layer in layers.items()}, data)


def keep_of(request: ConversionRequest, layer: core.MoE) -> Any:
    """Return how many experts of a layer, or which share of them, the options keep."""
    return len(_left(request, layer)) if getattr(request.options, "without", ()) else request.options.keep


def _left(request: ConversionRequest, layer: core.MoE) -> list[int]:
    """Return the experts of a layer that ``--without`` leaves.

    Raises:
        ValueError: there is none of a number or domain.
    """
    E, domains, gone = layer.num_experts, _domains(request), request.options.without
    for name in gone:
        check_name("--without", name, [*map(str, range(E)), *domains])
    return [e for e in range(E) if not {str(e), *domains[e : e + 1]} & {*gone}]


def _domains(request: ConversionRequest) -> list[str]:
    """Return the names of the data's domains, if each of them has an expert of its own."""
    own = ((request.run.config or {}).get("data") or {}).get("init_args") or {}
    by_domain = all(isinstance(moe.router, core.Domain) for moe in moe_configs(request.run.arguments().get("moe")))
    return list(own.get("domains") or ()) if by_domain else []


def upcycled(request: ConversionRequest) -> Conversion:
    """Return MoE layers that replace dense networks, with experts initialized from them."""
    options = request.options
    arguments, moe = _with_moe(request)
    start = start_of(options.start)

    def sparse(name: str, seed: int) -> Tensors:
        network = request.module.get_submodule(name)
        layer = core.sparsify(
            network, moe, "", options.start, noise=options.noise, seed=seed, exact=not options.inexact
        )
        assert isinstance(layer, SparseFFN)
        return layer.moe.state_dict()

    return _sparse(request, arguments, lambda part: start.config(moe, part), sparse)


def merged(request: ConversionRequest) -> Conversion:
    """Return the mean of several runs, or a sparse model whose experts are their networks; of one run with adapters,
    the model that has them in its linear layers."""
    if request.run.is_adapted:
        return _with_updates_merged(request, lambda name, adapted: adapted)
    options, runs = request.options, (request.run, *request.others)
    for other in request.others:
        _check_alike(request.run, other)
    states = [run.state for run in runs]

    def mean(name: str) -> Tensors:
        return {"": core.average_states([{name: state[name]} for state in states], options.weights)[name]}

    if options.how == "average":
        if options.moe is not None:
            raise ValueError(f"--moe {options.moe} is for --how btx, not for the mean")
        return Conversion(request.run.arguments(), {name: partial(mean, name) for name in states[0]})
    arguments, moe = _with_moe(request)
    modules = [request.module, *(run.mapped() for run in request.others)]
    gates: dict[str, Tensor] = {}

    def mixed(name: str, seed: int) -> Tensors:
        own = {"": gates[name]} if gates else None
        layer = core.mix_models(
            [m.get_submodule(name) for m in modules], moe, "", options.weights, seed=seed, gates=own
        )
        assert isinstance(layer, SparseFFN)
        return layer.moe.state_dict()

    conversion = _sparse(request, arguments, lambda part: replace(moe, expert=part.expert), mixed)
    if options.gates == "examples":
        gates |= _of_examples(request, list(conversion.replaced), mean)
    means = {name: partial(mean, name) for name in states[0] if conversion.owner(name) is None}
    return replace(conversion, replaced={**conversion.replaced, **means})


def _of_examples(request: ConversionRequest, names: Sequence[str], mean: Callable[[str], Tensors]) -> dict[str, Tensor]:
    """Return the gates of layers from the validation batches of each run, read by the runs' mean."""
    runs, options = (request.run, *request.others), request.options
    trials = [RunTrial(run.file, options.config, options.rest, options.batches) for run in runs]
    (model := trials[0].model).load_state_dict({name: mean(name)[""] for name in request.run.state})

    def run(model: Any, trial: RunTrial) -> None:
        trial.cli.trainer.validate(model, datamodule=trial.cli.datamodule, verbose=False)

    return core.example_gates(model, names, [[trial] for trial in trials], run)


def adapted(request: ConversionRequest) -> Conversion:
    """Return the frozen model with trainable adapters on some of its linear layers."""
    options, run = request.options, request.run
    plain = model_section(read_config(options.moe)).get("moe")
    if plain is None:
        raise ValueError(f"{options.moe} has no model.moe, which says what the adapters are")
    if plain.get("expert") is None:
        raise ValueError(f"{options.moe} has no model.moe.expert, which is an update, such as core.LoRA or core.IA3")
    extra = {"adapted": {"moe": plain, "modules": list(options.modules)}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        adapt_linears(request.module, extra)
    layers = {name: m for name, m in request.module.named_modules() if isinstance(m, core.AdaptedLinear)}
    return Conversion(run.arguments(), {name: layer.state_dict for name, layer in layers.items()}, extra=extra)


def quantized(request: ConversionRequest) -> Conversion:
    """Return the same layers with integers for their experts' matrices."""
    run, how = request.run, request.options.how
    left = quantize_model(request.module, how).state_dict()
    replaced = {name: request.module.get_submodule(name).state_dict for name in run.state if name not in left}
    return Conversion(run.arguments(), replaced, extra={"quantized": how})


def _with_updates_merged(
    request: ConversionRequest, prepared: Callable[[str, core.AdaptedLinear], core.AdaptedLinear]
) -> Conversion:
    """Return a model whose adapters are a part of its linear layers; its MoE layers stay.

    Args:
        request: of a run with adapters.
        prepared: returns a layer with adapters that are the same for every token, by the layer's name.
    """
    named = request.module.named_modules(remove_duplicate=False)
    layers = {name: module for name, module in named if isinstance(module, core.AdaptedLinear)}

    def linear(name: str) -> Tensors:
        try:
            return core.merge_adapters(prepared(name, layers[name])).state_dict()
        except ValueError as error:
            raise ValueError(f"module {name!r}: {error}") from None

    return Conversion(request.run.arguments(), {name: partial(linear, name) for name in layers})


def one_of_many(request: ConversionRequest, **named: Any) -> OneLayer:
    """Return the function that cuts one network out of a layer, as the options or ``named`` say."""
    options = request.options
    named |= {w: getattr(options, w) for w in ("task", "domain", "expert") if getattr(options, w) is not None}
    if len(named) != 1 or (options.pair is not None and options.task is not None):
        raise ValueError("one of --task, --domain, --expert, --pair and --keep says what the model is for")
    return lambda name, layer: core.cut_out(layer, **named)


def part_of(module: Any, name: str) -> DataPart:
    """Return the part of the data that a model knows, such as a translator's pair of languages.

    Raises:
        ValueError: there is none of this name, or the model knows no parts.
    """
    if not hasattr(module, "part"):
        raise ValueError(f"{type(module).__name__} knows no parts of its data by name, such as {name!r}")
    return cast(DataPart, module.part(name))


def specialized(request: ConversionRequest) -> Conversion:
    """Return the network of one part of the data, or the experts that it uses most."""
    options = request.options
    if options.keep is not None:
        named = next((w for w in ("task", "domain", "expert") if getattr(options, w) is not None), None)
        if named is not None:
            raise ValueError(f"--keep {options.keep} with --{named}: experts are cut out or pruned by use")
        return pruned(request)
    if options.pair is None:
        return _dense(request, one_of_many(request))
    part = part_of(request.module, options.pair)
    return replace(_dense(request, one_of_many(request, task=part.task), **part.arguments), data=part.data)


KINDS: dict[str, Callable[[ConversionRequest], Conversion]] = {
    "upcycle": upcycled,
    "densify": densified,
    "prune": pruned,
    "merge": merged,
    "adapt": adapted,
    "quantize": quantized,
    "specialize": specialized,
}
BY_LOAD = ("use", "most_used")


def _dense(request: ConversionRequest, one: OneLayer, **changed: Any) -> Conversion:
    """Return a model with a dense network for each MoE layer.

    Args:
        request: of a sparse run.
        one: returns the ``OneExpert`` for a layer, by the layer's name.
        changed: other arguments of the model.

    Raises:
        ValueError: the networks are not alike, or a layer has no equivalent dense network.
    """
    arguments, layers = request.run.arguments(), sparse_layers(request)
    dropout = max(float(getattr(config.expert, "dropout", 0.0)) for config in moe_configs(arguments["moe"]))
    ffns: dict[core.DenseFFN, str] = {}
    places = {name: _place(request.module, name) for name in layers}
    for name, layer in layers.items():
        made: Any = one(name, layer).feed_forward()
        gated, bias = made.w_gate is not None, made.w_in.bias is not None
        ffn = core.DenseFFN(made.w_in.out_features, made.activation, gated=gated, bias=bias, dropout=dropout)
        ffns.setdefault(ffn, name)
    if len(ffns) > 1:
        (a, first), (b, second), *_ = ffns.items()
        raise ValueError(f"{first!r} becomes {a} and {second!r} {b}: one dense_ffn stands for layers that are alike")
    # A network of another library has its own again, which is not the suite's to choose.
    own = {"dense_ffn": next(iter(ffns))} if places.keys() == {*places.values()} else {}
    arguments |= {"moe": None, **own, **changed}
    outline = request.run.outline(arguments)

    def network(name: str) -> Tensors:
        made = one(name, layers[name]).feed_forward()
        return _filled(outline.get_submodule(places[name]), made.w_in.weight.dtype, places[name], made)

    return Conversion(arguments, {places[name]: partial(network, name) for name in layers})


def _place(module: nn.Module, name: str) -> str:
    """Return the name of the network in whose place an MoE layer is: that of the ``SparseFFN`` around it, if any."""
    around = name.rpartition(".")[0]
    return around if isinstance(module.get_submodule(around), SparseFFN) else name


@torch.no_grad()
def _filled(outline: nn.Module, dtype: torch.dtype, name: str, network: nn.Module) -> Tensors:
    """Return the tensors of a dense network of the model's own class that computes what ``network`` does.

    Args:
        outline: the network without values, such as timm's ``Mlp``.
        dtype: of the tensors.
        name: of the network, for the message.
        network: the suite's dense layer.

    Raises:
        ValueError: the model's network has another form.
    """
    own = copy.deepcopy(outline).to(dtype).to_empty(device="cpu")
    place, source = read_ffn(own), read_ffn(network)
    assert source is not None
    shapes = [None if part is None else {k: v.shape for k, v in part.weights.items()} for part in (place, source)]
    if place is None or shapes[0] != shapes[1]:
        raise ValueError(f"module {name!r} is a {type(own).__name__} in a dense model, which is not {source.expert}")
    for key, value in place.weights.items():  # views of the network's own tensors
        value.copy_(source.weights[key])
    return own.state_dict()


def with_fewer(config: core.MoEConfig, layer: core.MoE, keep: int | float, constants: bool) -> core.MoEConfig:
    """Return the config of a layer with fewer experts, or with constants for some."""
    E, config = layer.num_experts, config.split(layer.row_dim) if layer.row_dim is not None else config
    kept = number_to_keep(keep, E)
    if constants and kept < E:
        return replace(config, expert=core.Mixed((config.expert, core.Constant()), (kept, E - kept)))
    return replace(config, num_experts=kept, router=config.router.resized(kept))


def _with_moe(request: ConversionRequest) -> tuple[dict[str, Any], core.MoEConfig]:
    """Return the arguments of a dense run with the MoE layers of an overlay, and their config."""
    run, file = request.run, request.options.moe
    if file is None:
        raise ValueError("--moe FILE is needed: an overlay that says what the MoE layers are")
    if run.arguments().get("moe") is not None:
        raise ValueError(f"{run.file} is sparse already: its moe is set")
    arguments = run.arguments(read_config(file))
    moe = arguments.get("moe")
    if not isinstance(moe, core.MoEConfig):
        raise ValueError(f"{file} has no model.moe of one config, which all networks become")
    return {**arguments, **({"dense_ffn": None} if "dense_ffn" in arguments else {})}, moe


def _sparse(
    request: ConversionRequest,
    arguments: dict[str, Any],
    config: Callable[[FeedForwardPart], core.MoEConfig],
    tensors: Callable[[str, int], Tensors],
) -> Conversion:
    """Return a model with an MoE layer for each network in whose place the arguments put one.

    MoE layers that the dense run has as well, such as a head of several gates, stay as they are.

    Args:
        request: of a dense run.
        arguments: of the sparse model, whose experts are not the network's yet.
        config: returns the layer for a network.
        tensors: returns the layer's tensors, by the name of the dense network and a seed.

    Raises:
        ValueError: the module there is not a feed-forward network, or two networks differ.
    """
    configs: list[core.MoEConfig] = []
    present = core.moe_layers(request.module)
    outline = request.run.outline(arguments)
    names = {_place(outline, name): name for name in core.moe_layers(outline) if name not in present}
    if arguments.get("share_experts"):
        raise ValueError("share_experts=True has one set of experts for networks that differ")
    modules = dict(request.module.named_modules())
    for name in names:
        if name not in modules:
            raise ValueError(f"the run has no module {name!r} that could become experts")
        part = read_ffn(modules[name])
        if part is None:
            kind = type(modules[name]).__name__
            raise ValueError(f"module {name!r} is a {kind}, and no feed-forward network that becomes experts")
        configs.append(config(part))
    alike = all(one == configs[0] for one in configs)
    arguments = {**arguments, "moe": configs[0] if alike else configs}
    seed = request.options.seed

    def layer(place: str, seed: int) -> Tensors:
        inside = names[place].removeprefix(place).lstrip(".")
        return {f"{inside}.{name}".lstrip("."): value for name, value in tensors(place, seed).items()}

    return Conversion(arguments, {place: partial(layer, place, seed + i) for i, place in enumerate(names)})


def _check_alike(first: TrainedRun, other: TrainedRun) -> None:
    """Raise a ``ValueError`` if two runs have other models, or read their data otherwise."""
    if first.kind is not other.kind:
        kinds = f"{other.file} holds {name_of(other.kind)}, and {first.file} {name_of(first.kind)}"
        raise ValueError(f"{kinds}: runs of one class are merged")
    here, there = first.state, other.state
    name = next((n for n in {**here, **there} if n not in here or n not in there), None)
    if name is not None:
        lacking = first.file if name not in here else other.file
        raise ValueError(f"{lacking} lacks {name}: runs of one architecture are merged")
    for argument in first.kind.data_arguments:
        own, given = (run.checkpoint["hyper_parameters"].get(argument) for run in (first, other))
        if own != given:
            raise ValueError(f"{other.file} has another {argument} than {first.file}: their numbers mean other things")
    if not _equal(first.checkpoint.get("encoding"), other.checkpoint.get("encoding")):
        raise ValueError(f"{other.file} encodes its data otherwise than {first.file}")


def _equal(a: Any, b: Any) -> bool:
    """Return whether two values of plain ones and tensors are equal."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)
