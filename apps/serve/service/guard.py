"""What every request passes: who may ask, from where, how many at once; how an early answer is sent; and the metrics,
in the text format of Prometheus."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from apps.base.ports import host_of
from apps.serve.service.options import Limits
from apps.serve.service.reading import Reading, Refused, give_way

if TYPE_CHECKING:
    import core


_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """The counters of a service, in a separate registry, so that two services of a process share nothing.

    Args:
        about: labels that describe the served model.
        waiting: returns the number of inputs that wait for the model.
    """

    def __init__(self, about: Mapping[str, str], waiting: Callable[[], int]) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
        from prometheus_client.process_collector import ProcessCollector

        self._registry = CollectorRegistry()
        given: dict[str, Any] = {"namespace": "moesaic", "registry": self._registry}
        self._given = given
        Gauge("service", "What is served.", list(about), **given).labels(**about).set(1)
        Gauge("inputs_waiting", "Inputs that wait for the model.", **given).set_function(waiting)
        self.open = Gauge("requests_open", "Requests that were let in and are not answered.", **given)
        self._requests = Counter("requests", "Requests that were answered.", ["path", "status"], **given)
        self._seconds = Histogram(
            "request_seconds", "Time from a request to its whole answer.", ["path"], buckets=_SECONDS, **given
        )
        sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256)
        self._batch = Histogram("batch_inputs", "Inputs of a batch of the model.", buckets=sizes, **given)
        self._batch_seconds = Histogram("batch_seconds", "Time of the model for a batch.", buckets=_SECONDS, **given)
        labels = ["layer", "expert"]
        self._pairs = Counter(
            "expert_pairs", "Tokens that an expert computed, in the batches looked at.", labels, **given
        )
        self._dropped = Counter(
            "dropped_pairs", "Choices that no expert had room for, in the batches looked at.", ["layer"], **given
        )
        ProcessCollector(registry=self._registry)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def computed(self, size: int, seconds: float) -> None:
        """Count a batch of the model."""
        self._batch.observe(size)
        self._batch_seconds.observe(seconds)

    def routed(self, layer: str, pairs_E: list[int], dropped: int) -> None:
        """Count the pairs that the experts of a layer computed, and the pairs dropped for lack of capacity."""
        for expert, pairs in enumerate(pairs_E):
            self._pairs.labels(layer, str(expert)).inc(pairs)
        self._dropped.labels(layer).inc(dropped)

    def follow_offload(self, offloaded: core.OffloadedExperts) -> None:
        """Show the counters of a model whose experts are offloaded."""
        from prometheus_client import Gauge

        for name, about in (
            ("hits", "Experts that were on the device when they were needed."),
            ("misses", "Experts that were not."),
            ("stall_seconds", "Time that the model waited for them."),
            ("bytes_moved", "Bytes that were copied to the device."),
        ):
            read = partial(_figure, offloaded, name)
            Gauge(f"offload_{name}", about, **self._given).set_function(read)

    @property
    def num_answered(self) -> int:
        """The number of requests that were answered."""
        return sum(int(s.value) for m in self._requests.collect() for s in m.samples if s.name.endswith("_total"))

    def text(self) -> tuple[bytes, str]:
        """Return all of them as they are, and the content type of that."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST


def _figure(offloaded: core.OffloadedExperts, name: str) -> float:
    return float(getattr(offloaded.statistics, name))


HEALTH = "/healthz"
"""The path that asks for no token: it says nothing but that the service is at work."""
_LINGER = 2.0
"""Seconds in which what is still on its way is thrown away, before a connection is closed."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Guard:
    """Wrap an ASGI application with access checks, limits and metrics.

    It rejects a request with a wrong token, one that is addressed to another name, and one above the limit. It counts
    all, but only admitted requests count toward those that are answered at the same time. At the limit a body that has
    been arriving for over a second gives way to a new request.

    If an answer comes before the body has been read, such as "413", the rest of the body is discarded for a moment and
    the connection is closed: a client that is still sending gets the answer, and the whole body is never read. A client
    that has shown no token gets one answer, its body is not read, and its connection is closed at once.

    Args:
        app: the application inside.
        token: token that a request must bring; None: nothing.
        names: names by which it may be asked; None: any. Without a token a page of another site could otherwise reach
            the service by a name of its own for 127.0.0.1.
        limits: of the service.
        metrics: that count.
        paths: the paths that are counted separately.
        refusal: makes the application that answers a ``Refused``.
    """

    def __init__(
        self,
        app: Any,
        token: str | None,
        names: Collection[str] | None,
        limits: Limits,
        metrics: Metrics,
        paths: Collection[str],
        refusal: Callable[[Refused], Any],
    ) -> None:
        self._app, self._token, self._names = app, None if token is None else token.encode(), names
        self._limits, self._metrics, self._paths, self._refusal = limits, metrics, paths, refusal
        self._open = 0
        self._reading: Reading = {}
        self._lingering = set[_Exchange]()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, path = time.perf_counter(), scope["path"] if scope["path"] in self._paths else "other"
        app, known = self._app, False
        try:
            known = self._knows(scope)
            if known and self._open >= self._limits.requests and not give_way(self._reading):
                rule = f"{self._limits.requests} requests are answered at the same time: try again later"
                raise Refused(503, rule, {"retry-after": "1"})
        except Refused as refused:
            app = self._refusal(refused)
        scope["reading"] = self._reading
        most = self._limits.body if known else 0
        exchange = _Exchange(scope, receive, send, most, self._lingering, self._limits.waiting // 2)
        counted = known and app is self._app
        self._open += counted
        self._metrics.open.set(self._open)
        try:
            await app(scope, exchange.receive, exchange.send)
        finally:
            self._open -= counted
            self._metrics.open.set(self._open)
            self._metrics.answered(path, exchange.status, time.perf_counter() - begin)

    def _knows(self, scope: Message) -> bool:
        """Tell whether a request has shown that it may ask for more than ``HEALTH``; if it may not: ``Refused``."""
        head = len(scope["raw_path"]) + len(scope["query_string"]) + sum(map(len, chain(*scope["headers"])))
        if head > self._limits.head:
            raise Refused(431, f"the head of a request has at most {self._limits.head} bytes")
        host = host_of(scope["headers"])
        if host is None:
            raise Refused(400, "a request has one Host header, which is NAME or NAME:PORT")
        if self._names is not None and host not in self._names:
            raise Refused(400, "host is none of this service's names: " + ", ".join(sorted(self._names)))
        if scope["path"] == HEALTH:
            return False
        if self._token is not None:
            scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._token):
                what = "a wrong token" if scheme else "no token"
                raise Refused(
                    401, f"the request has {what}: send Authorization: Bearer TOKEN", {"www-authenticate": "Bearer"}
                )
        return True


class _Exchange:
    """One request and its answer, after which ``most`` bytes are thrown away; with 0 the connection is closed.

    It is closed at once, too, while ``room`` others of ``lingering`` do so: each is a connection that nobody may close.
    """

    def __init__(
        self, scope: Message, receive: Receive, send: Send, most: int, lingering: set[_Exchange], room: int
    ) -> None:
        self.status, self._closes = 0, not most
        self._lingering, self._room = lingering, room
        self._receive, self._send, self._left = receive, send, most
        headers = dict(scope["headers"])
        self._unread = headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            self._unread = False
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self._unread or self._closes:
                message["headers"] = [*message["headers"], (b"connection", b"close")]
        elif self._unread and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self._throw_away()
            message = {"type": "http.response.body"}
        await self._send(message)

    async def _throw_away(self) -> None:
        if len(self._lingering) >= self._room:
            return
        self._lingering.add(self)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LINGER):
                    while self._unread and self._left > 0:
                        self._left -= len((await self.receive()).get("body", b""))
        finally:
            self._lingering.discard(self)
