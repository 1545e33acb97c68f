"""The body of a request, bytes to inputs. An error in it is a ``Refused`` with its HTTP status and one line."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from apps.base.messages import excerpt, first_line, one_line
from apps.serve.service.options import Limits

_LONGEST = 300
"""Characters of a complaint at most: the value that it names may be a whole image."""
_SLOW = 1.0
"""Seconds that every body may take to arrive, also if the service is full."""
_SHOWN = 60
"""Characters of the value."""
_EXACT = 2**53
"""Floats below hold every integer."""
_SURROGATE = re.compile(r"\\[uU][dD][89a-fA-F]")


class Refused(Exception):
    """A request that is not answered.

    Attributes:
        status: of HTTP.
        line: why, in one line.
        headers: of the answer.
    """

    def __init__(self, status: int, line: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(line)
        self.status, self.line, self.headers = status, _cut(one_line(line)), dict(headers or {})


async def read_body(request: Any, limits: Limits) -> bytes:
    """Return the body of a Starlette request.

    Raises:
        Refused: 413 before more than ``limits.body`` is in memory, 415 for another type than JSON, 408 for one that
            takes longer than ``limits.seconds``, or than ``give_way`` allows.
    """
    from starlette.requests import ClientDisconnect

    kind = request.headers.get("content-type", "")
    if kind.split(";")[0].strip().lower() != "application/json":
        raise Refused(415, f"content-type={excerpt(kind)} is not application/json")
    if (coding := request.headers.get("content-encoding", "identity").strip().lower()) != "identity":
        raise Refused(415, f"content-encoding={excerpt(coding)} is not read: send the JSON as it is")
    length = request.headers.get("content-length")
    if length is not None and (not length.isdecimal() or int(length) > limits.body):
        raise _too_large(length, limits)
    chunks, size = [], 0
    reading: Reading = request.scope.setdefault("reading", {})
    try:
        async with asyncio.timeout(limits.seconds) as patience:
            reading[patience] = asyncio.get_running_loop().time()
            async for chunk in request.stream():
                size += len(chunk)
                if size > limits.body:
                    raise _too_large(f"{size} and more", limits)
                chunks.append(chunk)
    except TimeoutError:
        within = "while others waited" if patience.when() == 0 else f"within {limits.seconds:g} seconds"
        raise Refused(408, f"the body did not arrive {within}") from None
    except ClientDisconnect:
        raise Refused(400, "the connection was closed before the body was whole") from None
    finally:
        reading.pop(patience, None)
    return b"".join(chunks)


Reading = dict[asyncio.Timeout, float]
"""The bodies that are arriving: the time limit of each by when it began, the oldest first."""


def give_way(reading: Reading) -> bool:
    """End the body that has been arriving for the longest, if for over a second, and return whether there is one.

    A service is then not full of clients that send a byte now and then.
    """
    patience, began = next(iter(reading.items()), (None, 0.0))
    if patience is None or asyncio.get_running_loop().time() - began < _SLOW:
        return False
    del reading[patience]
    patience.reschedule(0)
    return True


def _too_large(length: str, limits: Limits) -> Refused:
    return Refused(413, f"the body has {length} bytes: at most {limits.body} are read")


def _too_deep() -> Refused:
    return Refused(400, "the body is no JSON that can be read: it is too deep")


class Reader:
    """Turns a body into the inputs of a model.

    Args:
        schema: JSON schema of the body, of which "inputs" is a list.
        read: turns one of them into the model's input; raises a ValueError where it cannot.
    """

    def __init__(self, schema: Mapping[str, Any], read: Callable[[Any], Any]) -> None:
        import jsonschema_rs

        self._validator = jsonschema_rs.Draft202012Validator(dict(schema), mask="")
        self._read = read

    def inputs(self, body: bytes) -> list[Any]:
        """Return the inputs.

        Raises:
            Refused: 400 for invalid JSON, 422 for input that breaks the schema or cannot be read; the line names the
                place of the value.
        """
        value = parse(body)
        try:
            for error in self._validator.iter_errors(value):
                raise Refused(422, _complaint(error))
        except ValueError:  # the validator reads fewer levels than Python
            raise _too_deep() from None
        inputs = []
        for place, item in enumerate(value["inputs"]):
            try:
                inputs.append(self._read(item))
            except ValueError as error:
                raise Refused(422, f"inputs[{place}]: {first_line(error)}") from error
        return inputs


def parse(body: bytes) -> Any:
    """Return the value of a JSON text in UTF-8.

    Raises:
        Refused: 400; NaN, infinite numbers and halves of surrogate pairs are not JSON either.
    """
    try:
        text = body.decode("utf-8")
        value = json.loads(text, parse_constant=_refuse, parse_float=_number)
        if _SURROGATE.search(text):  # a pair is a character, and a half of one is not text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise Refused(400, "the body is no JSON: half a surrogate pair is no character") from None
    except UnicodeDecodeError as error:
        raise Refused(400, f"the body is no JSON in UTF-8: byte {error.start} is 0x{body[error.start]:02x}") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:  # also an integer of more digits than Python reads
        raise Refused(400, f"the body is no JSON: {first_line(error)}") from None
    return value


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _number(digits: str) -> float:
    """Return a number that has a point or an exponent: 2.0 and 2e0 are whole to a schema, and so they are 2 here."""
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{_cut(digits)} is too large for a number")
    return int(number) if number.is_integer() and abs(number) < _EXACT else number


def _complaint(error: Any) -> str:
    """Return the place of a value that breaks the schema, the value where it is a short one, and the rule."""
    if branches := getattr(error.kind, "context", None):  # of "oneOf": the branch that fits best says more
        return _complaint(min(branches, key=lambda errors: (len(errors), -len(errors[0].instance_path)))[0])
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.instance_path).lstrip(".")
    if isinstance(error.instance, dict | list):
        return f"{where or 'the body'}: {one_line(error.message)}"
    value = error.instance[:_LONGEST] if isinstance(error.instance, str) else error.instance
    written = json.dumps(value, ensure_ascii=False)
    written = written if len(written) <= _SHOWN else written[: _SHOWN - 3] + "..."
    return f"{where or 'the body'}={written} {one_line(error.message)}"


def _cut(line: str) -> str:
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."
