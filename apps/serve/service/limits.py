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
        head: bytes of a request's head (its line and its headers) at most; a larger one is 431.
        head_seconds: that a head may take to arrive, from when it is waited for; a slower connection is closed.
        waiting: connections beyond ``requests`` at most; of more, the one that has waited longest is closed.
    """

    body: int = 8 * MIB
    inputs: int = 256
    requests: int = 128
    seconds: float = 30.0
    head: int = 64 * 2**10
    head_seconds: float = 10.0
    waiting: int = 256
