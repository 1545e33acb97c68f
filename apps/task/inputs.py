"""Inputs of a model, in each form: JSON, a field of a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apps.report.exhibit import ChoiceField, Field, NumberField, TextField


def _as_json(plain: Any, name: str) -> Any:
    return plain


def _as_read(read: Any) -> Any:
    return read


@dataclass(frozen=True)
class Input:
    """One thing that a user gives a model: an image, a text, a column of a row.

    In whatever form it comes, it becomes the same *value*, and a task makes a batch of the values of several examples.

    Attributes:
        schema: its JSON schema, with every limit that a schema can say.
        example: a value as JSON has it, for the example of a schema.
        from_json: returns the value of input that has passed the schema, given the thing's name too; raises a
            ``ValueError`` of one line with the name, the value, and a rule that the schema could not say.
        field: its field on a page, which rejects values that the model cannot take; None: a page leaves it out.
        from_page: returns the value that its field has read, or raises a ``ValueError`` as ``from_json``.
        is_required: whether each request must have it.
        default: the value of an example that does not have it.
        is_shown: whether the example of a schema has it.
    """

    schema: Mapping[str, Any]
    example: Any
    from_json: Callable[[Any, str], Any] = _as_json
    field: Field | None = None
    from_page: Callable[[Any], Any] = _as_read
    is_required: bool = True
    default: Any = None
    is_shown: bool = True


def text(label: str, sample: str, longest: int = 10_000, may_be_empty: bool = False, **more: Any) -> Input:
    """Return a text of at most so many characters."""
    field = TextField(label, may_be_empty=may_be_empty, longest=longest)
    return Input({"type": "string", "maxLength": longest}, sample, field=field, **more)


def choice(label: str | None, choices: Sequence[str], says: str, **more: Any) -> Input:
    """Return one of several values; a page leaves it out without a label."""
    field = None if label is None else ChoiceField(label, tuple(choices), choices[0])
    return Input({"enum": list(choices), "description": says}, choices[0], field=field, default=choices[0], **more)


def number(
    label: str | None,
    sample: int,
    default: int | None,
    least: int,
    most: int,
    says: str = "",
    shown: int | None = None,
    in_example: bool = True,
) -> Input:
    """Return an integer that a request may leave out; a page leaves it out without a label.

    Args:
        label: name on a page.
        sample: the example of a schema, and the first value on a page.
        default: the value if the input is missing; None: the task says.
        least, most: its bounds.
        says: description for the schema.
        shown: its upper bound on a page; None: ``most``.
        in_example: whether the example of a schema has it.
    """
    schema = {"type": "integer", "minimum": least, "maximum": most, "description": says}
    schema |= {} if default is None else {"default": default}
    field = None if label is None else NumberField(label, sample, whole=True, least=least, most=shown or most)
    return Input(schema, sample, field=field, is_required=False, default=default, is_shown=in_example)
