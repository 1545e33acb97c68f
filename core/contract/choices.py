"""The choices of a tape, apart from all else: kept in a file, and taken again by ``core.replay``."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .routing import Routing
from .tape import Tape


@dataclass(frozen=True)
class Choices:
    """The experts that each token took, pass by pass.

    Attributes:
        experts: int64 (T, K) for each pass, by the layer's name; -1 for padding.

    Example::

        with core.record(server) as tape:
            server(batch)
        core.Choices.of(tape).save("choices.safetensors")
        with core.replay(model, core.Choices.load("choices.safetensors")):
            loss = model(batch)
    """

    experts: Mapping[str, tuple[Tensor, ...]]

    @classmethod
    def of(cls, tape: Tape) -> Choices:
        """Take the choices of a tape.

        Raises:
            ValueError: a layer chose no fixed number of experts per token, or dropped pairs for lack of capacity.
        """
        experts: dict[str, tuple[Tensor, ...]] = {}
        for entry in tape.entries:
            routing = entry.routing
            if not isinstance(routing, Routing) or routing.top_k is None:
                raise ValueError(f"layer {entry.name!r} has a {type(routing).__name__} without K experts per token")
            ids_TK = routing.expert_ids_N.detach().unflatten(0, (routing.num_tokens, routing.top_k))
            none_TK = ids_TK == len(routing.tokens_per_expert_E)
            if routing.valid_T is not None:
                ids_TK, none_TK = ids_TK.masked_fill(~routing.valid_T[:, None], -1), none_TK & routing.valid_T[:, None]
            if bool(none_TK.any()):
                raise ValueError(
                    f"layer {entry.name!r} dropped {int(none_TK.sum())} pairs: record without a capacity, as inside "
                    "core.set_capacity_factor(model, None)"
                )
            experts[entry.name] = (*experts.get(entry.name, ()), ids_TK)
        return cls(experts)

    def save(self, path: str | Path) -> None:
        """Write a file of safetensors with int32 tensors ``<layer>@<pass>``."""
        header, data = {}, b""
        for name, passes in self.experts.items():
            for number, ids_TK in enumerate(passes):
                content = ids_TK.to("cpu", torch.int32).contiguous().numpy().tobytes()
                place = [len(data), len(data) + len(content)]
                header[f"{name}@{number}"] = {"dtype": "I32", "shape": [*ids_TK.shape], "data_offsets": place}
                data += content
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data)

    @classmethod
    def load(cls, path: str | Path) -> Choices:
        """Read what ``save`` wrote.

        Raises:
            ValueError: the file is damaged or has other content.
        """
        content = Path(path).read_bytes()
        experts: dict[str, dict[int, Tensor]] = {}
        try:
            (length,) = struct.unpack("<Q", content[:8])
            for name, entry in json.loads(content[8 : 8 + length]).items():
                layer, _, number = name.rpartition("@")
                start, end = entry["data_offsets"]
                ids = torch.frombuffer(bytearray(content[8 + length + start : 8 + length + end]), dtype=torch.int32)
                experts.setdefault(layer, {})[int(number)] = ids.long().view(entry["shape"])
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, struct.error) as error:
            raise ValueError(f"{path} has no choices of core.Choices: {error}") from None
        return cls({layer: tuple(passes[i] for i in sorted(passes)) for layer, passes in experts.items()})
