"""Files of ``moesaic export``: their description, and their graphs, which onnxruntime runs instead of the weights.

One graph is one ONNX file, whose metadata say the rest. Several graphs, or a graph with extra files, are a folder with
``export.json``. Both are data: the classes that they name are looked up among registered ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apps import registry
from apps.base.checks import check_installed
from apps.base.messages import first_line
from apps.base.sealed import check_seal
from apps.train.checkpoint.loading import check_beside, module_class
from apps.train.step.module import SparseModule
from core.config.plain import arguments_from_plain

MANIFEST = "export.json"
"""The file of a folder that says what the others are."""
DESCRIPTION = "moesaic.model"
"""The entry of a file's metadata that holds its ``Description``."""


@dataclass(frozen=True)
class Description:
    """Description of the model in an exported file, as JSON.

    Attributes:
        app: "vision", "tables", ...; see ``apps.train.publish.exporting.Exported``.
        module: the model's class, as ``apps.registry.name_of`` names it.
        arguments: the model's arguments as plain values, without those that only training uses.
        preprocessing: values for turning inputs into the graph's tensors, and its outputs into answers.
        data: section "data" of a configuration, without the paths of a training; None: none is known.
        format: "onnx", "torch_export" or "aoti".
        graphs: file of each graph, by its name; only in a folder.
        files: further files; only in a folder.
        scalars: the model's parameters and buffers of one number, by name, such as a loss's temperature.
    """

    app: str
    module: str
    arguments: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    data: Mapping[str, Any] | None = None
    format: str = "onnx"
    graphs: Mapping[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    scalars: Mapping[str, float] = field(default_factory=dict)

    def to_json(self, indent: int | None = None) -> str:
        """Return the description as JSON."""
        return json.dumps(vars(self), ensure_ascii=False, indent=indent)

    @classmethod
    def from_json(cls, text: str, path: Path) -> Description:
        """Read the JSON of ``path``.

        Raises:
            ValueError: the text does not describe an exported model.
        """
        try:
            values = registry.of_today(json.loads(text))
            described = cls(**values)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a model that moesaic export has written: {first_line(error)}") from None
        plain = (described.arguments, described.preprocessing, described.graphs, described.scalars)
        if not isinstance(described.module, str) or not all(isinstance(part, Mapping) for part in plain):
            raise ValueError(f"{path} is not a model that moesaic export has written: its fields are of other types")
        arguments = registry.of_today(described.arguments, "model")
        return replace(described, arguments=registry.without_dropped(described.module, arguments))


class OnnxGraph(nn.Module):
    """A graph of an ONNX file on the CPU, as a module without weights.

    Args:
        path: the file.

    Attributes:
        inputs: names of its inputs.
        outputs: names of its outputs.

    Raises:
        OSError: the file cannot be read.
        ValueError: onnxruntime is not installed, or the file is damaged, or ``moesaic export`` has not written it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.digest = check_seal(path)
        runtime = onnxruntime()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self.session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has an error of its own for each failure
            raise ValueError(f"{path} cannot be run by onnxruntime: {first_line(error)}") from error
        self.path = path
        self.inputs = tuple(value.name for value in self.session.get_inputs())
        self.outputs = tuple(value.name for value in self.session.get_outputs())

    def get_extra_state(self) -> Tensor:
        """Return the file's digest: the fingerprint of a model tells one file from another, as it does weights."""
        return torch.frombuffer(bytearray.fromhex(self.digest), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Keep the graph as it is."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """Entries of the file's metadata."""
        return dict(self.session.get_modelmeta().custom_metadata_map)

    def forward(self, inputs: Mapping[str, Tensor | None]) -> tuple[Tensor, ...]:
        """Return the outputs for named inputs; inputs that the graph does not have are not read.

        Raises:
            ValueError: an input is missing, or of another type or shape than the graph's.
        """
        arrays = {}
        for name in self.inputs:
            value = inputs.get(name)
            if value is None:
                raise ValueError(f"{self.path} needs the input {name!r}, and the data have none")
            arrays[name] = np.ascontiguousarray(value.numpy(force=True))
        try:
            outputs = self.session.run(None, arrays)
        except Exception as error:
            raise ValueError(f"{self.path} cannot be run on these inputs: {first_line(error)}") from error
        return tuple(torch.from_numpy(output) for output in outputs)


class ExportedNetwork(nn.Module):
    """A graph that is called as the network was that it is made of: by position. It returns the first output.

    Options, such as a context for routers, are part of the graph and are not read.
    """

    def __init__(self, graph: OnnxGraph) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, *inputs: Tensor, **options: Any) -> Tensor:
        return self.graph(dict(zip(self.graph.inputs, inputs, strict=True)))[0]


@dataclass(frozen=True)
class ExportedModel:
    """An exported ONNX model.

    Attributes:
        path: its file, or its folder.
        description: description of the model.
        graphs: its graphs, by their names.
    """

    path: Path
    description: Description
    graphs: Mapping[str, OnnxGraph]

    @classmethod
    def read(cls, path: str | Path) -> ExportedModel:
        """Open a file or a folder.

        Raises:
            FileNotFoundError: there is none.
            ValueError: onnxruntime is not installed, or the file is damaged, of another format, names a class that is
                not registered, or ``moesaic export`` has not written it.
        """
        path = Path(path)
        opened = cls._of_folder(path) if (path / MANIFEST).is_file() else cls._of_file(path)
        opened.task  # noqa: B018 - a class without one is rejected here
        if opened.description.data is not None:
            check_beside({"data": opened.description.data}, path)
        return opened

    @classmethod
    def _of_file(cls, path: Path) -> ExportedModel:
        if path.is_dir():
            raise ValueError(f"{path} holds no {MANIFEST}: it is not a folder that moesaic export has written")
        if not path.is_file():
            raise FileNotFoundError(f"no exported model {path}")
        if (path.parent / MANIFEST).is_file():
            raise ValueError(f"{path} is one graph of several: give the folder {path.parent}")
        if path.suffix == ".pt2":
            raise ValueError(f"{path} is of torch's format: moesaic predict runs that of onnx")
        graph = OnnxGraph(path)
        description = Description.from_json(graph.metadata.get(DESCRIPTION, ""), path)
        return cls(path, description, {"model": graph})

    @classmethod
    def _of_folder(cls, path: Path) -> ExportedModel:
        manifest = path / MANIFEST
        try:
            text = manifest.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{manifest} is damaged: it is no UTF-8 text") from None
        description = Description.from_json(text, manifest)
        if description.format != "onnx":
            raise ValueError(f"{path} is of the format {description.format}: moesaic predict runs that of onnx")
        names = (*description.graphs.values(), *description.files)
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise ValueError(f"{manifest} names {name!r}, which is no file beside it")
        return cls(path, description, {name: OnnxGraph(path / file) for name, file in description.graphs.items()})

    def file(self, name: str) -> bytes:
        """Return the content of a file stored with the graphs.

        Raises:
            ValueError: the description names no such file.
        """
        if name not in self.description.files:
            raise ValueError(f"{self.path} has no file {name}")
        return (self.path / name).read_bytes()

    @property
    def kind(self) -> type[SparseModule]:
        """The class of the model: an app's, or one that the program has imported."""
        return module_class({"module_class": self.description.module}, self.path)

    @property
    def task(self) -> Any:
        """The task of the model's class."""
        return registry.exported_task(self.kind)

    @property
    def checkpoint(self) -> dict[str, Any]:
        """The parts of the model's checkpoint other than its weights: class, arguments and encoding."""
        encoding = self.task.encoding_state(self)
        return {
            "module_class": registry.name_of(self.description.module),
            "hyper_parameters": dict(self.description.arguments),
            **({} if encoding is None else {"encoding": encoding}),
            "state_dict": {},
        }

    def attach(self, model: SparseModule) -> None:
        """Let ``model``, made on the meta device, run the graphs instead of its weights, in evaluation mode."""
        checkpoint = self.checkpoint
        self.task.attach(model, self.graphs)
        for part, module in model.named_modules():
            _fill(module, f"{part}." if part else "", self.description.scalars)
        model.to("cpu")  # tells Lightning where the module is
        model.starts_afresh = False
        model.adopt_encoding(checkpoint)
        model.eval()

    def load(self) -> SparseModule:
        """Return the model, which predicts as the checkpoint's model does."""
        arguments = arguments_from_plain(self.kind, self.description.arguments, f"{self.path}: model")
        with torch.device("meta"):
            model = self.kind(**arguments)
        self.attach(model)
        return model


def _fill(module: nn.Module, prefix: str, scalars: Mapping[str, float]) -> None:
    """Fill the module's own meta-device tensors with their numbers, or with NaN if nothing reads them."""

    def filled(name: str, like: Tensor) -> Tensor:
        number = scalars.get(prefix + name, float("nan") if like.is_floating_point() else 0)
        return torch.full_like(like, number, device="cpu")

    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.is_meta:
            module._parameters[name] = nn.Parameter(filled(name, parameter), requires_grad=False)
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.is_meta:
            module._buffers[name] = filled(name, buffer)


def onnxruntime() -> Any:
    """Return onnxruntime.

    Raises:
        ValueError: it is not installed; the message says how it is.
    """
    check_installed("an exported model", ["onnxruntime"], "export")
    import onnxruntime

    return onnxruntime
