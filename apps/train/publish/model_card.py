"""The card of a pretrained folder, its ``README.md``: the model, its test results, and how to use it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import core
from apps.base.messages import one_line
from apps.nets.depths import TokenGate
from apps.train.checkpoint.contents import read_checkpoint
from apps.train.cost.kinds import MEANINGS, kind_of_network
from apps.train.cost.quantizing import form_of
from apps.train.watch.logs import split_routing

MOST_LAYERS = 16
"""Layers up to which the table of the routing has each; of more it has the mean alone."""


@dataclass(frozen=True)
class ModelKind:
    """Text that the cards of all models of an app share.

    Attributes:
        title: kind of model, such as "an image classifier".
        example: line of Python that predicts, where ``model`` is the model.
        task: the hub's name of the task (its ``pipeline_tag``); None: it has none.
        tags: further words to find it by.
    """

    title: str = "a sparse model"
    example: str = "help(model.predict)"
    task: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measured:
    """Results of ``moesaic test`` with the weights of a card.

    Attributes:
        metrics: values by name, without "test/".
        routing: figures by layer and name; the layer "" has the means.
        facts: data, seed, date, machine and the like, by name.
    """

    metrics: Mapping[str, float]
    routing: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)


def measured(run: Path | None, state: Mapping[str, Any]) -> Measured | str:
    """Return the figures of the test in a run's folder, or why there are none for these weights.

    Args:
        run: the folder; None: it is not known.
        state: ``state_dict`` of the model. A figure of other weights is not shown.
    """
    if run is None:
        return "the model comes from no run's folder"
    path = run / "test.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        checkpoint = Path(values["checkpoint"])
    except FileNotFoundError:
        return f"no test is in the run's folder ({path.name} is missing)"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{path.name} of the run cannot be read"
    # The path in the file is as it was given, and the folder may have moved since.
    places = (checkpoint, run / "checkpoints" / checkpoint.name)
    tested = next((place for place in places if place.exists()), None)
    if "quantized" in values:
        how = values["quantized"].get("experts") if isinstance(values["quantized"], Mapping) else values["quantized"]
        return f"the test in the run's folder is of experts in {how}, quantized for it alone"
    if tested is None or not _same(read_checkpoint(tested)["state_dict"], state):
        return f"the test in the run's folder is of other weights ({checkpoint.name})"
    figures, routing = split_routing({k: float(v) for k, v in values.items() if isinstance(v, (int, float))}, "test")
    return Measured(figures, routing, {**_of_config(run / "config.yaml"), **_of_test(values.get("measured"))})


def _same(there: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    def tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}

    one, other = tensors(there), tensors(here)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name].detach().cpu()) for name in one)


def _of_config(path: Path) -> dict[str, str]:
    """Return data and seed, as a run's configuration has them."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        data = config["data"]
        dataset = (data.get("init_args") or {}).get("dataset")
        kind = str(data["class_path"]).rpartition(".")[2]
        return {
            "data": f"{dataset} ({kind})" if dataset else kind,
            "seed of the training": str(config.get("seed_everything", "")),
        }
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return {}


def _of_test(facts: Any) -> dict[str, str]:
    """Return machine, versions, date and command, as a test keeps them."""
    if not isinstance(facts, Mapping):
        return {}
    flat = {**facts, **(facts.get("packages") or {})}
    return {str(name): str(value) for name, value in flat.items() if name != "packages"}


def card(name: str, module: Any, figures: Measured | str) -> str:
    """Return the text of ``README.md``.

    Args:
        name: name of the folder.
        module: the ``SparseModule``.
        figures: the result of ``measured``.
    """
    kind: ModelKind = module.model_kind
    sparse = kind_of_network(module)
    class_name = type(module).__name__
    lines = [
        f"# {name}",
        "",
        f"{kind.title[0].upper()}{kind.title[1:]}: a `{class_name}` of moesaic, **{sparse}** ({MEANINGS[sparse]}).",
        "",
        *_network(module),
        "",
        "## Use",
        "",
        "```python",
        "import apps",
        "",
        'model = apps.load("PATH OF THIS FOLDER")',
        kind.example,
        "```",
        "",
        f'From a hub: `{class_name}.from_pretrained("OWNER/{name}")`. The folder also serves as `--ckpt_path` of the '
        "command `moesaic`. It holds no code: tensors and plain values alone.",
        "",
        "## Measured",
        "",
        *_figures(figures, module),
        "",
        "## License, data and limits",
        "",
        "To be filled in by who publishes the model: its license, where its training data come from, what it is for "
        "and what it is not for.",
    ]
    return "\n".join([*_front_matter(name, module, figures), *lines]) + "\n"


def _network(module: Any) -> list[str]:
    """Return the lines on parameters and MoE layers."""
    params, active = core.num_params(module), core.active_params(module)
    lines = [f"- parameters: {params:,}, of which one token or example touches at most {active:,}"]
    if (form := form_of(module)) is not None:
        lines.append(f"- the matrices of the experts are quantized, as `--quantize {form}` does it")
    for layer_name, layer in core.moe_layers(module).items():
        if isinstance(layer, TokenGate):
            continue
        router = getattr(getattr(layer, "router", None), "config", None)
        experts, pairs = getattr(layer.experts, "num_experts", None), getattr(layer, "pairs_per_token", None)
        many = f"{experts} experts, " if experts is not None else ""
        takes = f"{pairs:g} a token, " if pairs is not None else ""
        lines.append(f"- `{layer_name}`: {many}{takes}`{type(layer if router is None else router).__name__}`")
    return lines


def _figures(figures: Measured | str, module: Any) -> list[str]:
    if isinstance(figures, str):
        return [f"No figures: {figures}. `moesaic test` writes them into the run's folder."]
    lines = ["One run, tested once; a single run gives no estimate of the spread over seeds.", ""]
    lines += ["| metric of the test | value |", "|---|---|"]
    lines += [f"| {name} | {value:.6g} |" for name, value in _in_order(figures.metrics, module).items()]
    signatures = getattr(module, "metric_signatures", {})
    lines += ["", *(f"{name}: `{signature}`" for name, signature in signatures.items())] if signatures else []
    layers = {name: values for name, values in figures.routing.items() if name}
    rows = layers if 0 < len(layers) <= MOST_LAYERS else {"mean of the layers": figures.routing.get("", {})}
    names = list(dict.fromkeys(name for values in rows.values() for name in values))
    if names:
        lines += ["", f"| routing in the test | {' | '.join(n.replace('_', ' ') for n in names)} |"]
        lines += ["|---" * (len(names) + 1) + "|"]
        for layer, values in rows.items():
            lines.append(f"| {layer} | {' | '.join(f'{values[n]:.4g}' if n in values else '' for n in names)} |")
    if figures.facts:
        lines += ["", "| measured with | |", "|---|---|"]
        lines += [f"| {name} | {_cell(value)} |" for name, value in figures.facts.items()]
    return lines


def _in_order(metrics: Mapping[str, float], module: Any) -> dict[str, float]:
    """Return the metrics with the monitored one first, then the metrics that tables show."""
    monitored, shown = module.monitor.partition("/")[2], module.shown_metrics
    return dict(sorted(metrics.items(), key=lambda item: (item[0] != monitored, item[0] not in shown)))


def _cell(text: str) -> str:
    return one_line(text).replace("|", "\\|")


def _front_matter(name: str, module: Any, figures: Measured | str) -> list[str]:
    """Return the metadata that a hub reads; the license is the publisher's to add."""
    from huggingface_hub import EvalResult, ModelCardData

    kind: ModelKind = module.model_kind
    results = None
    if isinstance(figures, Measured):
        data = figures.facts.get("data", "the run's test data")
        shown = [module.monitor.partition("/")[2], *module.shown_metrics]
        results = [
            EvalResult(kind.task or "other", data.partition(" ")[0], data, metric, figures.metrics[metric])
            for metric in shown
            if metric in figures.metrics
        ]
    layers = core.moe_layers(module)
    tags = ["moesaic", *(["mixture-of-experts"] if layers else []), *kind.tags]
    metadata = ModelCardData(
        library_name="moesaic", pipeline_tag=kind.task, tags=tags, model_name=name, eval_results=results or None
    )
    return ["---", metadata.to_yaml(), "---", ""]
