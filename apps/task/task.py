"""A trained model in use: its inputs, its answers, and the use of its experts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

import core
from apps import registry
from apps.data.given import GivenConfig, GivenData
from apps.report.exhibit import Answer, Example, Exhibit, LayerPart, Part, Said
from apps.task.inputs import Input
from apps.task.outputs import Output
from apps.task.service import Service
from apps.task.sizes import Sizes, Trial
from apps.train.publish.exported import ExportedNetwork
from apps.train.publish.exporting import Exported

Values = Mapping[str, Any]
"""The values of one example, by the names of the inputs."""


class Task(ABC):
    """A trained model in use. Each model of an app has a subclass, ``TASK`` of its room's module ``task``.

    A subclass names the inputs (``inputs``) and the output (``output``), how a batch of the one becomes the other
    (``answers``), and which names the tokens of a tape have (``layers`` of an example, ``tokens`` of a test's batch). A
    service and a page follow from these. Methods that need no trained model, such as a plan's questions, are class
    methods.

    Args:
        model: the trained model, in evaluation.

    Attributes:
        inputs: the user's inputs, by name, in the order of a page's fields.
        output: the kind of answer.

    Raises:
        ValueError: the model's checkpoint keeps too little of its data to be used.
    """

    app: ClassVar[str]
    """Name of the script in the docs that reads an export."""
    noun: ClassVar[str]
    """Title of a request: "Image"."""
    verb: ClassVar[str]
    """Word on a page's button: "Classify"."""
    alternatives: ClassVar[int] = 1
    """Alternatives that a page shows, where a search finds so many."""
    additional_properties: ClassVar[bool] = False
    """Whether a request may have further properties, which are left out."""
    combinations: ClassVar[Mapping[str, Sequence[str]]] = {}
    """Inputs that a request has together, by the title of each combination; empty: a request may have all of them."""
    streams: ClassVar[bool] = False
    """Whether ``answers`` calls an example's "tell", if it has one, with the text of its answer each time it grows."""
    columns: ClassVar[tuple[str, ...]] = ()
    """Options of ``Sizes.columns`` that say something of such a model's data."""

    inputs: Mapping[str, Input]
    output: Output

    def __init__(self, model: Any) -> None:
        self.model = model

    # ---- for subclasses: a trained model

    @property
    @abstractmethod
    def description(self) -> str:
        """Request and answer, described in a sentence or two."""

    @property
    @abstractmethod
    def instructions(self) -> str:
        """Instructions for a page and their result, in a sentence or two."""

    @property
    def page_values(self) -> Mapping[str, Any]:
        """Values that an example has on a page in addition to its fields, if they differ from the inputs' defaults."""
        return {}

    @abstractmethod
    def answers(self, examples: Sequence[Values], most: int = 1) -> Sequence[Any]:
        """Return the answer to each example, computed together.

        Args:
            examples: their values.
            most: alternatives that an answer has at most, of a search that finds several.
        """

    def layers(self, tape: core.Tape, example: Values, answer: Any) -> Mapping[str, tuple[LayerPart, ...]]:
        """Return the experts that computed an example, by layer; ``tape`` has only the passes of its answer."""
        return {}

    def examples(self, data: Any, most: int) -> tuple[Example, ...]:
        """Return at most so many examples of a run's data, as a page's fields show them."""
        return ()

    @abstractmethod
    def exported(self) -> Exported:
        """Return the networks as graphs of tensors, and how raw inputs become those tensors."""

    # ---- for subclasses: without a trained model

    @classmethod
    def attach(cls, model: Any, graphs: Mapping[str, Any]) -> None:
        """Let a model without weights run exported graphs instead of its networks: ``model.model`` is the only one."""
        model.model = ExportedNetwork(graphs["model"])

    @classmethod
    def encoding_state(cls, exported: Any) -> dict[str, Any] | None:
        """Return the encoding of a checkpoint from an ``ExportedModel``; None if the model has none."""
        return None

    @classmethod
    def data_arguments(cls, given: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
        """Return the arguments of the model's constructor that its data would tell.

        Raises:
            Missing: nothing says a size; the message names the option.
        """
        return {}

    @classmethod
    @abstractmethod
    def trial(cls, model: Any, sizes: Sizes, dtype: torch.dtype) -> Trial:
        """Return a forward of a model that is on the meta device."""

    @classmethod
    def tokens(cls, model: Any, entry: Any, batch: Any) -> Mapping[str, Tensor]:
        """Return labels of the tokens of a recorded pass, for the counts of a test's report.

        Args:
            model: the trained model.
            entry: the pass, an entry of a tape.
            batch: the model's input.

        Returns:
            By kind of label, such as "item" or "class": the number of each token, int64 (T,), or of each sequence,
            (B,); a negative one has no label.
        """
        return {}

    @classmethod
    def own_data(cls, given: GivenData) -> GivenConfig | None:
        """Return the configuration of a small model of a user's own data; None: the data have another kind.

        Raises:
            ValueError: the data have this kind, but cannot be used.
        """
        return None

    # ---- what follows

    def item(self) -> dict[str, Any]:
        """Return the JSON schema of a request's input."""
        if not self.combinations:
            return item_of(self.inputs, self.noun, self.description, self.additional_properties)
        kinds = [
            item_of(
                {name: self.inputs[name] for name in names}, title, additional_properties=self.additional_properties
            )
            for title, names in self.combinations.items()
        ]
        examples = [example for kind in kinds for example in kind.pop("examples")]
        return {"title": self.noun, "description": self.description, "oneOf": kinds, "examples": examples}

    def read(self, item: Mapping[str, Any]) -> Values:
        """Return the values of an input that has passed the schema."""
        return read_item(self.inputs, item)

    def service(self) -> Service:
        """Return the model behind a URL."""

        def predict(examples: Sequence[Values]) -> list[Any]:
            return [self.output.to_json(answer) for answer in self.answers(examples)]

        listen = (lambda values, tell: {**values, "tell": tell}) if self.streams else None
        return Service(self.item(), self.output.schema, self.read, predict, listen)

    def exhibit(self, data: Any, most: int) -> Exhibit:
        """Return the model at work, for a page.

        Args:
            data: data for examples; None: there are none.
            most: number of examples at most.

        Raises:
            ValueError: a page has no field for an input.
        """
        fields = {name: own.field for name, own in self.inputs.items() if own.field is not None}
        left_out = {name: own.default for name, own in self.inputs.items() if name not in fields} | dict(
            self.page_values
        )

        def answer(read: Sequence[Any], tell: Callable[[Part], None] | None = None) -> Answer:
            typed = zip(fields, read, strict=True)
            example = {**left_out, **{name: self.inputs[name].from_page(one) for name, one in typed}}
            if tell is not None:
                example["tell"] = lambda text: tell(Said(self.output.schema["title"], text))
            with core.record(self.model) as tape:
                (one,) = self.answers([example], self.alternatives)
            return Answer(self.output.to_parts(one), self.layers(tape, example, one))

        examples = () if data is None else self.examples(data, most)
        return Exhibit(self.instructions, self.verb, tuple(fields.values()), answer, examples, self.streams)


def item_of(
    inputs: Mapping[str, Input], title: str, says: str = "", additional_properties: bool = False
) -> dict[str, Any]:
    """Return the JSON schema of an object of inputs, with an example.

    Args:
        inputs: by their names.
        title, says: describe the object.
        additional_properties: whether it may have further properties, which are left out.
    """
    return {
        "title": title,
        **({"description": says} if says else {}),
        "type": "object",
        "required": [name for name, own in inputs.items() if own.is_required],
        "properties": {name: own.schema for name, own in inputs.items()},
        **({} if additional_properties else {"additionalProperties": False}),
        "examples": [{name: own.example for name, own in inputs.items() if own.is_shown}],
    }


def read_item(inputs: Mapping[str, Input], item: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of an object that has passed its schema."""
    return {name: own.from_json(item[name], name) if name in item else own.default for name, own in inputs.items()}


def config_of(given: GivenData) -> GivenConfig:
    """Return the configuration of the first model that takes data of a user.

    Raises:
        ValueError: no model knows them, or one knows and rejects them.
    """
    for name in registry.OWN_DATA:
        made = registry.task_named(name).own_data(given)
        if made is not None:
            return made  # type: ignore[no-any-return]
    if len(given.paths) == 2:
        raise ValueError(f"{given.paths[0]} and {given.paths[1]} are not two files of text")
    path = given.paths[0]
    what = "is a folder with neither images nor tables" if path.is_dir() else "is no table (.csv, .parquet)"
    raise ValueError(
        f"{path} {what}: give a folder of images, one with a table of their titles, a table with --target"
        f"{', or two text files' if given.in_place else ', two text files, or a configuration'}"
    )
