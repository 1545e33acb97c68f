"""The service as an ASGI application: its paths, and what each answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from apps.serve.service.batching import Batcher, Broken
from apps.serve.service.guard import HEALTH, Guard
from apps.serve.service.interface import POLICY, page
from apps.serve.service.limits import Limits
from apps.serve.service.metrics import Metrics
from apps.serve.service.reading import Reader, Refused, read_body

log = logging.getLogger(__name__)

_READERS = 2
"""Threads that decode bodies while the model computes."""


def application(
    reader: Reader,
    batcher: Batcher,
    interface: Mapping[str, Any],
    limits: Limits,
    metrics: Metrics,
    token: str | None = None,
    names: Collection[str] | None = None,
) -> Any:
    """Return the application; it starts the batcher when it starts, and stops it when it ends.

    Args:
        reader: reads bodies.
        batcher: answers inputs.
        interface: the OpenAPI document.
        limits, metrics, token, names: see ``Guard``.
    """
    import torch
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, Response
    from starlette.routing import Route

    readers = ThreadPoolExecutor(_READERS, thread_name_prefix="reader")

    async def predict(request: Request) -> Response:
        body = await read_body(request, limits)
        inputs = await asyncio.get_running_loop().run_in_executor(readers, reader.inputs, body)
        del body  # it is larger than the inputs, and they may wait
        try:
            outputs = await asyncio.wrap_future(batcher.submit(inputs))
        except Broken as broken:
            raise Refused(503, str(broken), {"retry-after": "5"}) from None
        except (MemoryError, torch.OutOfMemoryError):
            raise Refused(503, "the machine has too little memory for an input of this size") from None
        except Exception as error:  # the log has the whole
            raise Refused(500, f"the model failed on an input ({type(error).__name__})") from None
        return _json(200, {"outputs": outputs})

    async def health(request: Request) -> Response:
        return _json(503 if batcher.broken else 200, {"status": "broken" if batcher.broken else "ok"})

    async def counters(request: Request) -> Response:
        text, kind = metrics.text()
        return Response(text, media_type=kind)

    async def openapi(request: Request) -> Response:
        return _json(200, interface)

    async def docs(request: Request) -> Response:
        html = page(interface, str(request.base_url).rstrip("/"))
        return HTMLResponse(html, headers={"content-security-policy": POLICY})

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        line = {404: f"there is no {request.url.path}", 405: f"{request.method} is not for {request.url.path}"}
        refused = Refused(error.status_code, line.get(error.status_code, error.detail), error.headers)
        return _refusal(refused)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return _refusal(error)

    async def fault(request: Request, error: Exception) -> Response:
        return _refusal(Refused(500, "the service failed"))  # the server's log has the whole

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        batcher.start()
        yield
        await asyncio.to_thread(batcher.stop)
        readers.shutdown()

    routes = [
        Route("/predict", predict, methods=["POST"]),
        Route(HEALTH, health),
        Route("/metrics", counters),
        Route("/openapi.json", openapi),
        Route("/docs", docs),
    ]
    handlers = {HTTPException: http_error, Refused: refused, Exception: fault}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)  # type: ignore[arg-type]
    app.router.redirect_slashes = False  # another address is another address
    paths = [route.path for route in routes]
    return Guard(app, token, names, limits, metrics, paths, _refusal)


def _json(status: int, value: Any, headers: Mapping[str, str] | None = None) -> Any:
    from starlette.responses import Response

    # A number that is none would be no JSON; the error is the service's, and better than a wrong answer.
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(text, status, headers, "application/json")


def _refusal(refused: Refused) -> Any:
    return _json(refused.status, {"error": refused.line}, refused.headers)
