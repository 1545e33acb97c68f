"""What is missing in a checkpoint, has a name that no loader reads, or a shape or dtype that its siblings have not."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apps.audit.checkpoint import SIDE, Faults, Part, Weights, read_parts, template

MOST = 0.75
"""Share of the siblings that must agree on a shape before another one is a fault: some models have experts of two
widths."""
_NETWORK = re.compile(
    r"(?<!shared_)(?:mlp|ffn|feed_forward|moe|mixer|DenseReluDense|experts)\.(?!gate\.|router|shared|.*bias)|\bfc\d"
)
_WIDTHS = ("moe_intermediate_size", "ffn_hidden_size", "intermediate_size", "d_ff", "encoder_ffn_dim")
_TARGETS = re.compile(r"all-linear|experts|\b((gate|up|down|gate_up)_proj|w[123io]|fc[12]|(in|out)put_linear)\b")


def find_holes(weights: Weights, parts: Sequence[Part], faults: Faults) -> None:
    """Note experts and tensors that are missing, or have other names than their siblings."""
    kinds = defaultdict[str, dict[str, dict[int, dict[str, Part]]]](lambda: defaultdict(lambda: defaultdict(dict)))
    for part in parts:
        # Rows of this project's routers may be tasks or empty choices; published ones have a row an expert.
        if part.expert is not None and (weights.num_experts or not part.is_router):
            form = re.sub(r"\.(qweight|weight_packed)$", ".weight", part.tail)  # its tail if it was not quantized
            kinds[template(part.layer)][part.layer][part.expert][form] = part
    for layers in kinds.values():
        experts = [held for layer in layers.values() for held in layer.values()]
        counts = Counter(form for held in experts for form in held)
        usual = {f: p.tail for held in experts for f, p in held.items() if 2 * counts[f] >= len(experts)}
        number = weights.num_experts or 1 + max(e for layer in layers.values() for e in layer)
        for name in [*layers, *_empty_layers(weights, next(iter(layers)))]:
            layer = layers.get(name, {})
            evidence = f"no file holds it; {name.rstrip('.')} has tensors of {len(layer)} experts of {number}"
            for e in sorted({*range(number), *layer}):
                held = layer.get(e, {})
                # An unquantized expert needs no scales; ``find_odd`` names the mix.
                plain = any(part.is_matrix and part.is_plain for part in held.values())
                free = {form for form in {*usual, *held} if SIDE.search(form) and (form in held or plain)}
                lost = sorted(usual[form] for form in usual.keys() - held.keys() - free)
                own = [part.name for form, part in held.items() if e >= number or form not in usual.keys() | free]
                if own:
                    why = f"its siblings have {lost[0]}" if lost else f"{number} siblings have none such"
                    faults["skipped_tensor", f"no loader reads it: {why}"] += own
                elif lost:
                    faults["missing_tensor", evidence] += [name + tail.replace("*", str(e)) for tail in lost]


def _empty_layers(weights: Weights, like: str) -> list[str]:
    """Return the MoE layers named as ``like`` that have neither experts nor a dense network."""
    match = re.match(r"(.*?)(?<![^.])\d+(\..*)", like)
    head, tail = match.groups() if match else ("", "")
    own = [re.match(rf"{re.escape(head)}(\d+)\.", name) for name in weights.known if match]
    filled = {int(m[1]) for m in own if m and _NETWORK.search(m.string)}
    last = max([weights.number("num_hidden_layers") - 1 if head == "model.layers." else -1, *filled])
    return [f"{head}{i}{tail}" for i in range(last + 1) if i not in filled]


def find_odd(weights: Weights, parts: Sequence[Part], faults: Faults) -> None:
    """Note matrices of another shape or dtype than their siblings, or than the configuration says."""
    dim, hidden = weights.number("hidden_size", "d_model"), weights.number(*_WIDTHS)
    alike, dtypes = defaultdict[Any, list[Part]](list), defaultdict[str, list[Part]](list)
    for part in parts:
        if part.is_matrix:
            alike[template(part.layer), part.tail, part.is_plain].append(part)
            dtypes[part.layer].append(part)
    for (kind, _, plain), same in alike.items():
        usual, count = Counter(tuple(part.tensor.shape) for part in same).most_common(1)[0]
        known = plain and dim and hidden and "attention" not in kind
        for part in same:
            shape = tuple(part.tensor.shape)
            if shape != usual and count >= MOST * len(same):
                faults["wrong_shape", f"it is {shape}, and {count} siblings are {usual}"].append(part.name)
            elif known and {*shape} not in ({dim, hidden}, {dim, 2 * hidden}):
                faults["wrong_shape", f"it is {shape}, config.json says {dim} and {hidden}"].append(part.name)
    for same in dtypes.values():
        few, most = sorted(([p for p in same if p.is_plain == plain] for plain in (True, False)), key=len)
        if few:
            evidence = f"it is {few[0].tensor.dtype}, and {len(most)} siblings are {most[0].tensor.dtype}"
            faults["mixed_dtypes", evidence] += [part.name for part in few]


def find_uncovered(adapter: Sequence[Part], settings: dict[str, Any], faults: Faults) -> None:
    """Note experts that an adapter does not change although it changes others or targets them.

    Args:
        adapter: its tensors.
        settings: ``adapter_config.json``. If the base model is not a folder of this machine, its experts are taken from
            the adapter's names.
        faults: takes the findings.
    """
    base = Path(str(settings.get("base_model_name_or_path")))
    covered = {(part.layer, part.expert) for part in adapter}
    numbers = [e for _, e in covered if e is not None]
    wanted = {(layer, e) for layer, _ in covered for e in range(max(numbers, default=-1) + 1)}
    if base.is_dir():
        wanted = {
            (p.layer, p.expert or 0) for p in read_parts(Weights(base, Faults(list)), Faults(list)) if p.is_matrix
        }
    left = sorted(pair for pair in wanted - covered if (pair[0], None) not in covered)
    if left and (covered or _TARGETS.search(f"{settings.get('target_modules')} {settings.get('target_parameters')}")):
        evidence = f"the adapter covers {len(wanted) - len(left)} of {len(wanted)} experts"
        faults["uncovered_experts", evidence] += [f"{layer}experts.{e}" for layer, e in left]
