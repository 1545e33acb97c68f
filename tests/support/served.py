"""A service of numbers that doubles them, for tests of HTTP without a model."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from apps.base.ports import bound
from apps.serve.service.application import application, body_schema, document
from apps.serve.service.batching import Batcher
from apps.serve.service.guard import Metrics
from apps.serve.service.options import Limits
from apps.serve.service.reading import Reader
from apps.task import Service

TOKEN = "a-token-of-the-tests"
LIMITS = Limits(body=1_000, inputs=4, requests=3, seconds=0.2)


def odd_is_refused(item: int) -> int:
    if item % 2:
        raise ValueError(f"{item} is odd")
    return item


def doubled(inputs: Sequence[int]) -> list[int]:
    return [2 * x for x in inputs]


def number_service(
    predict: Callable[[Sequence[int]], Sequence[Any]] = doubled, listen: Callable[..., Any] | None = None
) -> Service:
    """Even numbers up to 100; odd ones break a rule that the schema does not have."""
    item = {"title": "Number", "type": "integer", "minimum": 0, "maximum": 100, "examples": [2, 4]}
    return Service(item, {"type": "integer"}, odd_is_refused, predict, listen)


def served_numbers(
    predict: Callable[[Sequence[int]], Sequence[Any]] = doubled,
    token: str | None = None,
    limits: Limits = LIMITS,
    listen: Callable[..., Any] | None = None,
    **options: Any,
) -> tuple[Any, Batcher]:
    """Return the application of a ``number_service``, and its batcher."""
    service = number_service(predict, listen)
    batcher = Batcher(service.predict, 4, 0.001, **options)
    metrics = Metrics({"run": "numbers"}, lambda: len(batcher))
    names = {"testserver", "127.0.0.1", "[::1]"} if token is None else None
    interface = document(service, limits, "numbers", "1", token is not None)
    reader = Reader(body_schema(service, limits), service.read)
    return application(reader, batcher, interface, limits, metrics, token, names, listen), batcher


@contextlib.contextmanager
def listening(app: Any, limits: Limits = LIMITS, ends_after: float | None = None) -> Iterator[int]:
    """Serve an application as ``moesaic serve`` does, on a thread; yields its port.

    Args:
        app: the application.
        limits: of the service.
        ends_after: seconds after which it ends, as at SIGTERM; None: after the block.
    """
    from apps.serve.service.protocol import server_of

    server = server_of(app, limits)
    with bound(0) as socket:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
        thread.start()
        if ends_after is not None:
            threading.Timer(ends_after, lambda: setattr(server, "should_exit", True)).start()
        try:
            yield socket.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()
