"""The command line of ``moesaic serve``, read and checked before anything heavy is imported."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from apps.base.checks import check_at_least
from apps.base.ports import LOCAL, check_port, is_local
from apps.cli.parser import Parser
from apps.serve.service.limits import MIB, Limits
from apps.serve.service.token import VARIABLE, read_token
from apps.train.checkpoint_paths import MEANING, find_checkpoint
from apps.train.offloading import read_budget
from apps.train.quantising import read_form

PORT = 8000
LIBRARIES = ("starlette", "uvicorn", "httptools", "jsonschema_rs", "prometheus_client")
"""The packages that a service needs."""
_DESCRIPTION = f"""\
Serve a trained model of any app over HTTP: POST /predict with {{"inputs": [...]}} gives {{"outputs": [...]}}. The
interface is at /docs and, as OpenAPI, at /openapi.json; /healthz says whether the service is at work, /metrics counts.
Inputs of several requests are computed together. The service is for this machine alone ({LOCAL}), unless --host names
another address: then requests need a token. SIGTERM or Ctrl-C ends it, after what it has taken is answered.
docs/serving.md tells more."""


@dataclass(frozen=True)
class Options:
    """A command line of ``moesaic serve``, checked without reading a model.

    Attributes:
        checkpoint: the checkpoint.
        host: address or name that the service listens on.
        port: its port; 0: any that is free.
        token: what requests must bring; None: nothing.
        max_batch: inputs that are computed together at most.
        max_wait: seconds that an input waits for others at most.
        limits: what the service takes.
        device: where the model is; None: a GPU where there is one.
        quantize: the word for the experts' whole numbers, such as "int4"; None: as they are.
        offload: the words for how much of the experts is on the device, such as "64MB"; None: all are.
    """

    checkpoint: Path
    host: str
    port: int
    token: str | None = field(repr=False)
    max_batch: int
    max_wait: float
    limits: Limits
    device: str | None
    quantize: str | None = None
    offload: str | None = None

    @classmethod
    def read(cls, argv: Sequence[str]) -> Options:
        """Read ``argv``, the arguments after ``moesaic serve``.

        Raises:
            UsageError: an unknown option.
            ValueError: a value out of its range, a host or port that cannot be had, a host that others can reach
                without a token, or a library that is missing.
            FileNotFoundError: there is no checkpoint.
        """
        values = command_line().parse_args(list(argv))
        sizes = {name: getattr(values, name) for name in ("max_batch", "max_inputs", "max_body", "max_requests")}
        check_at_least(1, **sizes)
        if values.quantize is not None:
            read_form(values.quantize)
        if values.offload is not None:
            read_budget(values.offload)
        check_at_least(0, max_wait_ms=values.max_wait_ms)
        checkpoint = find_checkpoint(values.ckpt_path)
        token = read_token(values.token_file)
        if token is None and not is_local(values.host):
            raise ValueError(
                f"host={values.host} is for other machines too, and needs a token: give --token_file FILE, or set "
                f"{VARIABLE}"
            )
        check_port(values.port, values.host)
        check_libraries()
        limits = Limits(values.max_body * MIB, values.max_inputs, values.max_requests)
        wait = values.max_wait_ms / 1000
        place = (checkpoint, values.host, values.port, token)
        return cls(*place, values.max_batch, wait, limits, values.device, values.quantize, values.offload)


def check_libraries() -> None:
    """Raise a ValueError that says how to install what is missing."""
    for name in LIBRARIES:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f'moesaic serve needs {name}, which is not installed: pip install "moesaic[serve]"')


def command_line() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        prog="moesaic serve",
        allow_abbrev=False,
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--ckpt_path", required=True, metavar="RUN", help=MEANING)
    add("--config", metavar="FILE", help="configuration that names classes of your own, such as that of the run")
    add(
        "--host", default=LOCAL, help=f"address to listen on; other than this machine's own: a token (default: {LOCAL})"
    )
    add("--port", type=int, default=PORT, metavar="N", help=f"port; 0: a free one (default: {PORT})")
    token = f"file of the token that requests must bring (default: the variable {VARIABLE}, else none)"
    add("--token_file", type=Path, metavar="FILE", help=token)
    add("--max_batch", type=int, default=32, metavar="N", help="inputs computed together, at most (default: 32)")
    add("--max_wait_ms", type=float, default=2.0, metavar="T", help="time an input waits for others (default: 2)")
    add("--max_inputs", type=int, default=256, metavar="N", help="inputs of a request, at most (default: 256)")
    add("--max_body", type=int, default=8, metavar="MIB", help="size of a request, at most (default: 8)")
    add("--max_requests", type=int, default=128, metavar="N", help="requests at the same time, at most (default: 128)")
    add("--device", metavar="D", help="cpu, cuda, cuda:1, ... (default: cuda where there is a GPU)")
    add("--quantize", metavar="FORM", help="experts in int8, int4, or in groups of a size, such as int4:64")
    slots = "experts on the device: a share, such as 0.5, or a size, such as 64MB; :FILE keeps the others in a file"
    add("--offload", metavar="SIZE[:FILE]", help=slots)
    return parser
