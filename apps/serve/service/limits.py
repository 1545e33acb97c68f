"""How much a service takes, so that no client can take more of the machine than it is meant to have."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """The limits of a service.

    Attributes:
        body: bytes of a request's body at most; a larger one is 413 and is not read.
        inputs: inputs of a request at most.
        requests: requests at the same time at most; one more is 503 with ``Retry-After``.
        seconds: that a body may take to arrive; a slower one is 408.
    """

    body: int = 8 * MIB
    inputs: int = 256
    requests: int = 128
    seconds: float = 30.0
