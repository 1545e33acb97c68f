"""A trained model behind a URL: the JSON of one input, and the answers to a batch of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Service:
    """A trained model behind a URL.

    Attributes:
        item: JSON schema of one input, whose ``title``, ``description`` and ``examples`` the page of the interface
            shows. It says every limit that JSON schema can say (lengths, ranges, names of columns).
        answer: JSON schema of the answer to one input.
        read: turns one input that has passed the schema into what ``predict`` takes. Raises a ``ValueError`` that names
            the value and the rule if the schema could not say so: an image that cannot be read, an unknown pair.
        predict: answers several inputs at once, in their order, each with plain values that JSON takes. The answer to
            an input does not depend on other inputs of its batch, unless the routing says so.
        listen: makes ``predict`` tell the text of an answer as it grows, each time the whole of it so far: takes what
            ``read`` returned and the function to tell, and returns what ``predict`` takes. None: nothing grows.
    """

    item: Mapping[str, Any]
    answer: Mapping[str, Any]
    read: Callable[[Any], Any]
    predict: Callable[[Sequence[Any]], Sequence[Any]]
    listen: Callable[[Any, Callable[[str], None]], Any] | None = None
