"""The command ``moesaic serve``: load the model once, make its service, and answer until a signal ends it."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import core
from apps import registry
from apps.base.ports import bound, url_of
from apps.base.quiet import quiet
from apps.serve.service.application import application, body_schema, document
from apps.serve.service.batching import Batcher
from apps.serve.service.guard import Metrics
from apps.serve.service.options import ServeOptions
from apps.serve.service.reading import Reader
from apps.task import Service
from apps.train.checkpoint.loading import load
from apps.train.checkpoint.paths import run_name
from apps.train.checkpoint.stopping import on_signal

_LOOKED_AT = 16
"""One of so many batches is looked at for the use of the experts, which costs some time."""


def run(options: ServeOptions) -> int:
    """Serve a run's model until SIGTERM or SIGINT; a second SIGINT does not wait for running requests.

    Returns:
        0; 1 if the model has broken down; 143 and 130 where the signal came before the service was ready.

    Raises:
        ValueError: the checkpoint is damaged, of a model that no app has or whose app has no service; the device is
            none; or the port was taken meanwhile.
    """
    try:
        # The first process of a container heeds no signal by default.
        with on_signal(signal.SIGTERM, lambda *_: sys.exit(143)):
            with quiet(own_notes=False):
                model, offloaded = prepared(options)
                service = service_of(model)(model)
            with bound(options.port, options.host) as listening, _errors_alone():
                served = Served(model, service, options)
                if offloaded is not None:
                    served.metrics.follow_offload(offloaded)
                served.until_stopped(listening)
    except KeyboardInterrupt:
        return 130
    print(f"serve: ended; answered requests: {served.metrics.num_answered:,}", flush=True)
    return 1 if served.batcher.broken else 0


def prepared(options: ServeOptions) -> tuple[Any, core.OffloadedExperts | None]:
    """Return the model, in the form and on the device that the options ask for, and its offloaded experts.

    Raises:
        ValueError: as ``load`` and ``device_of``, or experts that cannot be quantized or offloaded.
    """
    device = device_of(options.device)
    model = load(options.checkpoint, device, quantize=options.quantize, offload=options.offload)
    return model, core.OffloadedExperts.of(model)


class Served:
    """A service with its batches and counters.

    Args:
        model: the model, whose experts are counted.
        service: what its app says of it.
        options: of the command.
    """

    def __init__(self, model: Any, service: Service, options: ServeOptions) -> None:
        from apps.serve.service.protocol import server_of

        name, limits = run_name(options.checkpoint), options.limits
        self._title = f"{name} ({type(model).__name__}, {options.checkpoint})"
        about = {"run": name, "model": type(model).__name__, "version": own_version()}
        self.batcher = Batcher(
            watched(
                model, service.predict, lambda layer, pairs_E, dropped: self.metrics.routed(layer, pairs_E, dropped)
            ),
            options.max_batch,
            options.max_wait_ms / 1000,
            is_fatal=lambda error: isinstance(error, torch.AcceleratorError),
            on_broken=self._stop,
            watch=lambda size, seconds: self.metrics.computed(size, seconds),
        )
        self.metrics = Metrics(about, lambda: len(self.batcher))
        interface = document(service, limits, name, own_version(), options.token is not None)
        reader = Reader(body_schema(service, limits), service.read)
        names = {"localhost", "127.0.0.1", "[::1]", options.host} if options.token is None else None
        app = application(reader, self.batcher, interface, limits, self.metrics, options.token, names, service.listen)
        self._server = server_of(app, limits)

    def until_stopped(self, listening: socket.socket) -> None:
        """Answer at a socket until a signal, or until the model has broken down; then finish the accepted requests.

        The address is printed, at which requests are taken from then on.
        """
        # uvicorn ends at these signals too, once it runs, and raises them again when it has ended.
        handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            print(f"serve: {self._title} at {url_of(listening)}", flush=True)
            self._server.run(sockets=[listening])
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _stop(self, *signal_and_frame: Any) -> None:
        self._server.should_exit = True


@contextlib.contextmanager
def _errors_alone() -> Iterator[None]:
    """Log no warnings of ours, of which each request could bring one."""
    own = logging.getLogger("apps")
    level = own.level
    own.setLevel(logging.ERROR)
    try:
        yield
    finally:
        own.setLevel(level)


def service_of(model: Any) -> Callable[[Any], Service]:
    """Return the function ``service`` of the app that a model is of.

    Raises:
        ValueError: no app has a service for such a model.
    """
    kind = registry.task_of(type(model), "service")
    return lambda own: kind(own).service()


def watched(
    model: Any, predict: Callable[[Sequence[Any]], Sequence[Any]], count: Callable[[str, list[int], int], None]
) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Return ``predict``, which counts the use of the experts in the first of each 16 batches.

    Args:
        model: the model behind it.
        predict: answers inputs.
        count: called for each layer of such a batch with its name, the pairs that each expert computed, and the number
            of those that no expert had room for.
    """
    number = 0

    def answer(inputs: Sequence[Any]) -> Sequence[Any]:
        nonlocal number
        looks = number % _LOOKED_AT == 0
        number += 1
        if not looks:
            return predict(inputs)
        with core.record(model) as tape:
            outputs = predict(inputs)
        for layer, stats in core.RoutingStats.from_tape(tape).layers.items():
            computed_E = stats.tokens_per_expert
            count(layer, computed_E.tolist(), int(stats.chosen_per_expert.sum()) - int(computed_E.sum()))
        return outputs

    return answer


def device_of(name: str | None) -> torch.device:
    """Return a device by its name; None: a GPU if there is one.

    Raises:
        ValueError: the device does not exist.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"device={name} is none of this machine") from None
    return device


def own_version() -> str:
    """Return the version of this suite; "0" where it runs uninstalled."""
    try:
        return version("moesaic")
    except PackageNotFoundError:
        return "0"
