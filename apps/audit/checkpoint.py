"""The files of a checkpoint, its tensors, and which layer and expert each belongs to by its name."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from apps.porting.files import ADAPTER, CONFIG, INDEX, SAFETENSORS, Safetensors, read_json, shards
from core.adopted.shrink import COUNTS

Faults = defaultdict[tuple[str, str], list[str]]
"""Names of tensors by their fault, a row of docs/reference/commands/audit.md, and its evidence, a sentence."""
_WORD = r"(?<![A-Za-z_])"  # shared_experts are none that a router chooses
_NAME = re.compile(
    rf"(?P<layer>.*?)(?:(?:experts\.)?{_WORD}(?P<router>(?:gate|router)(?:\.(?:wg|layer|classifier|gate))?\.weight)"
    rf"|{_WORD}(?P<head>experts?[._](?:expert_)?)(?P<e>\d+)\.(?P<rest>.+)"
    rf"|{_WORD}(?P<tail>(?:(?:gate|router)\.)?(?:moe_statics\.)?(?:e_score_correction|expert)_bias|router\.bias|experts\.(?!\d|parts\.).+"
    rf"|(?:input|output)_linear\.weight|(?<=experts\.parts\.\d\.).+))"  # ``Mixed`` has parts that count from 0 each
)
SIDE = re.compile(r"scale|zero|absmax|quant_|shape|g_idx|amax")
"""Tensors that a quantized matrix has next to its integers."""


class Weights:
    """Tensors of a folder or a file by name.

    Attributes:
        folder: the folder.
        config: its ``config.json`` if there is one, with the values of a text model inside it.
        known: names of all tensors, also of those that no file holds.
        num_experts: experts of a layer, as the configuration says; 0: it does not.

    Args:
        path: the folder, or one file of it.
        faults: takes what is wrong with the index.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: it holds no safetensors, or a file is damaged.
    """

    def __init__(self, path: Path, faults: Faults) -> None:
        if not path.exists():
            raise FileNotFoundError(f"no checkpoint {path}")
        self.folder = path if path.is_dir() else path.parent
        self.config: dict[str, Any] = read_json(self.folder / CONFIG) if (self.folder / CONFIG).is_file() else {}
        for inner in map(self.config.get, ("text_config", "ffn_config")):
            self.config |= inner if isinstance(inner, dict) else {}
        index = self.folder / (SAFETENSORS + INDEX)
        single = [file for file in (path, self.folder / SAFETENSORS, self.folder / ADAPTER) if file.is_file()]
        if not single and not index.is_file():
            raise ValueError(f"{path} holds no weights: neither {SAFETENSORS} nor {index.name} nor {ADAPTER}")
        places = dict.fromkeys(Safetensors(single[0]), single[0]) if single else shards(index)
        files = {place: Safetensors(place) for place in sorted({*places.values()}) if place.is_file()}
        self._file_of = {name: file for file in files.values() for name in file}
        self._file_of |= {name: files[place] for name, place in places.items() if name in files.get(place, ())}
        self.known = sorted({*places, *self._file_of})
        for name in self.known:
            place = places.get(name)
            if place is None:
                faults["skipped_tensor", "the index does not name it, so that no loader reads it"].append(name)
            elif place not in files:
                faults["missing_shard", f"{place.name} is missing"].append(name)
            elif name not in files[place]:
                holder = "another" if name in self._file_of else "no"
                faults["other_shard", f"the index names {place.name}, and {holder} file holds it"].append(name)
        self.num_experts = self.number(*COUNTS)

    def number(self, *names: str) -> int:
        """Return the first integer that the configuration has under one of the names; 0: none."""
        return next((value for value in map(self.config.get, names) if type(value) is int), 0)

    def get(self, name: str) -> Tensor | None:
        """Return a tensor, mapped from its file; None: no file holds it."""
        return self._file_of[name][name] if name in self._file_of else None


@dataclass(frozen=True)
class Part:
    """A tensor of one expert, a slice of a stacked one, or a row of a router.

    Attributes:
        layer: start of the names of the MoE layer, such as "model.layers.3.mlp.".
        expert: its number; None: the tensor has no axis of experts.
        tail: end of the name with a star for the number, such as "experts.*.w1.weight" or "experts.down_proj[*]".
        name: name of the tensor, with the number in brackets if it is stacked.
        tensor: the numbers, a ``Tensor``; None: no file holds them.
    """

    layer: str
    expert: int | None
    tail: str
    name: str
    tensor: Any

    @property
    def is_router(self) -> bool:
        return self.tail.startswith(("gate", "router")) and self.expert is not None

    @property
    def is_matrix(self) -> bool:
        """Whether it is an expert's matrix that can be read, not what a quantized one has next to its integers."""
        t = None if self.expert is None else self.tensor
        return t is not None and t.ndim > 1 and t.numel() > 1 and not SIDE.search(self.tail)

    @property
    def is_plain(self) -> bool:
        """Whether its numbers are not quantized."""
        return self.tensor is not None and self.tensor.is_floating_point() and self.tensor.itemsize > 1


def template(name: str) -> str:
    """Return a dotted name with a star for each number; parts of ``Mixed`` are of different kinds."""
    return re.sub(r"(?<![^.])(?<!parts\.)\d+(?![^.])", "*", name)


def read_parts(weights: Weights, faults: Faults, prefix: str = "") -> list[Part]:
    """Return the tensors of MoE layers, and note those with a prefix that most layers of their kind do not have.

    Args:
        weights: the tensors.
        faults: takes the findings.
        prefix: start of all names that is left out.
    """
    known = [name for name in weights.known if "shared_" not in name]
    found = {name: match for name in known if (match := _NAME.fullmatch(name.removeprefix(prefix)))}
    for name, right in _right_names(found).items():
        faults["skipped_tensor", f"no loader reads it: its siblings are named {template(right)}"].append(name)
        found[name] = _NAME.fullmatch(right) or found[name]
    parts: list[Part] = []
    for name, match in found.items():
        layer, t, number = match["layer"], weights.get(name), weights.num_experts
        tail = match["router"] or match["tail"] or f"{match['head']}*.{match['rest']}"
        if t is not None and tail.startswith("experts.mlp.") and number and len(t) % number == 0:
            t = t.unflatten(0, (number, -1))  # DBRX
        if not match["e"] and (t is None or t.ndim > 2 or (t.ndim == 2 and (len(t) == number or match["router"]))):
            slices = enumerate([None] * number if t is None else t.unbind())
            parts += [Part(layer, e, f"{tail}[*]", f"{name}[{e}]", own) for e, own in slices]
        else:
            parts.append(Part(layer, int(match["e"]) if match["e"] else None, tail, name, t))
    # Of routers without experts those of attention, which are none, are left out.
    sparse = {template(p.layer) for p in parts if not p.is_router or (weights.num_experts and "att" not in p.layer)}
    return [part for part in parts if template(part.layer) in sparse]


def _right_names(found: dict[str, re.Match[str]]) -> dict[str, str]:
    """Return the names that tensors would have by most layers of their kind, where these have other prefixes."""
    sizes, right = Counter(template(match["layer"]) for match in found.values()), dict[str, str]()
    for name, match in found.items():
        kind = template(match["layer"])
        for other, size in sizes.items():
            if other and kind.endswith(f".{other}") and size >= sizes[kind]:
                right[name] = match.string.split(".", kind[: -len(other)].count("."))[-1]
            elif kind and other.endswith(f".{kind}") and size > sizes[kind] and "*" not in other[: -len(kind)]:
                right[name] = other[: -len(kind)] + match.string
    return {name: other for name, other in right.items() if other not in found}
