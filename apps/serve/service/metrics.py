"""What a service counts, in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import core

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """The counters of a service, in a registry of their own, so that two services of a process share nothing.

    Args:
        about: labels that say what is served.
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
        """Count what the experts of a layer computed, and what they had no room for."""
        for expert, pairs in enumerate(pairs_E):
            self._pairs.labels(layer, str(expert)).inc(pairs)
        self._dropped.labels(layer).inc(dropped)

    def follow_offload(self, offloaded: core.OffloadedExperts) -> None:
        """Show what a model counts whose experts are offloaded."""
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
        """Return all of them as they stand, and the content type of that."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST


def _figure(offloaded: core.OffloadedExperts, name: str) -> float:
    return float(getattr(offloaded.statistics, name))
