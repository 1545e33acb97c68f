"""The command line of ``moesaic serve`` with its limits and token, read before anything heavy is imported."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from apps.base.checks import check_at_least, check_installed
from apps.base.ports import LOCAL, check_port, is_local
from apps.cli.options import Offload, Quantize
from apps.cli.parser import CommandLine, Config, Run
from apps.train.checkpoint.paths import find_checkpoint

VARIABLE = "MOESAIC_TOKEN"
_SHORTEST = 16


def read_token(file: Path | None) -> str | None:
    """Return the token of a file, else that of the variable ``MOESAIC_TOKEN``; None: neither is set.

    Raises:
        ValueError: the file cannot be read, or the token is short or has other characters than visible ASCII ones. The
            message does not show it.
    """
    if file is None:
        name, text = VARIABLE, os.environ.get(VARIABLE, "")
        if not text:
            return None
    else:
        name = f"token_file={file}"
        try:
            text = file.read_text("ascii").strip()
        except OSError as error:
            raise ValueError(f"{name} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            text = "\0"
    if any(not "!" <= c <= "~" for c in text):
        raise ValueError(f"{name} must hold one token of visible ASCII characters")
    if len(text) < _SHORTEST:
        raise ValueError(f"{name} has a token of {len(text)} characters: it must have at least {_SHORTEST}")
    return text


MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """The limits of a service.

    Attributes:
        body: maximum number of bytes of a request's body; a larger one is 413 and is not read.
        inputs: maximum number of inputs per request.
        requests: maximum number of concurrent requests; one more is 503 with ``Retry-After``.
        seconds: that a body may take to arrive; a slower one is 408.
        head: maximum number of bytes of a request's head (its line and its headers); a larger one is 431.
        head_seconds: that a head may take to arrive, from when it is waited for; a slower connection is closed.
        waiting: maximum number of connections beyond ``requests``; of more, the one that has waited longest is closed.
    """

    body: int = 8 * MIB
    inputs: int = 256
    requests: int = 128
    seconds: float = 30.0
    head: int = 64 * 2**10
    head_seconds: float = 10.0
    waiting: int = 256


LIBRARIES = ("starlette", "uvicorn", "httptools", "jsonschema_rs", "prometheus_client")
"""The packages that a service needs."""


@dataclass(frozen=True)
class ServeOptions(CommandLine):
    """Serve a trained model of any app over HTTP: POST /predict with {"inputs": [...]} gives {"outputs": [...]}. The
    interface is at /docs and, as OpenAPI, at /openapi.json; /healthz says whether the service is running, /metrics
    counts. Inputs of several requests are computed together. The service is only for this machine (127.0.0.1), unless
    --host names another address: then requests need a token. SIGTERM or Ctrl-C ends it, after the accepted requests are
    answered. docs/reference/commands/serve.md tells more.

    Attributes:
        config: configuration that names classes of your own, such as the run's
        host: address to listen on; other than this machine's own: a token
        port: port; 0: a free one
        token_file: file of the token that requests must bring (default: the variable MOESAIC_TOKEN, else none)
        max_batch: maximum number of inputs computed together
        max_wait_ms: time an input waits for others
        max_inputs: maximum number of inputs per request
        max_body: maximum size of a request in MiB
        max_requests: maximum number of concurrent requests
        device: cpu, cuda, cuda:1, ... (default: cuda where there is a GPU)

    Raises:
        ValueError: a value out of its range, a host or port that is not available, a host that others can reach without
            a token, or a library that is missing.
        FileNotFoundError: the checkpoint does not exist.
    """

    prog: ClassVar[str] = "moesaic serve"

    ckpt_path: Run
    config: Config | None = None
    host: str = LOCAL
    port: int = 8000
    token_file: Path | None = None
    max_batch: int = 32
    max_wait_ms: float = 2.0
    max_inputs: int = 256
    max_body: int = 8
    max_requests: int = 128
    device: str | None = None
    quantize: Quantize | None = None
    offload: Offload | None = None

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("max_batch", "max_inputs", "max_body", "max_requests")}
        check_at_least(1, **sizes)
        check_at_least(0, max_wait_ms=self.max_wait_ms)
        find_checkpoint(self.ckpt_path)
        if self.token is None and not is_local(self.host):
            raise ValueError(
                f"host={self.host} is for other machines too, and needs a token: give --token_file FILE, or set "
                f"{VARIABLE}"
            )
        check_port(self.port, self.host)
        check_installed("moesaic serve", LIBRARIES, "serve")

    @property
    def checkpoint(self) -> Path:
        return find_checkpoint(self.ckpt_path)

    @functools.cached_property
    def token(self) -> str | None:
        """What requests must bring; None: nothing."""
        return read_token(self.token_file)

    @property
    def limits(self) -> Limits:
        return Limits(self.max_body * MIB, self.max_inputs, self.max_requests)


OPTIONS = ServeOptions
