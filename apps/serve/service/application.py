"""The service as an ASGI application: its paths, their answers, and its interface as OpenAPI and as a page."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from apps.base.templates import template
from apps.serve.service.batching import Batcher, Broken
from apps.serve.service.guard import HEALTH, Guard, Metrics
from apps.serve.service.options import Limits
from apps.serve.service.reading import Reader, Refused, read_body
from apps.task import Service

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""The content security policy of the page, which is text alone."""


def body_schema(service: Service, limits: Limits) -> dict[str, Any]:
    """Return the JSON schema of a request's body."""
    inputs = {"type": "array", "items": service.item, "minItems": 1, "maxItems": limits.inputs}
    return {"type": "object", "required": ["inputs"], "properties": {"inputs": inputs}, "additionalProperties": False}


def document(service: Service, limits: Limits, title: str, version: str, has_token: bool) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of a service.

    Args:
        service: the model service.
        limits: of the service.
        title: name of the run.
        version: of this suite.
        has_token: whether requests need a token.
    """
    body = {"inputs": list(service.item.get("examples", ()))[: limits.inputs]}
    request = {"schema": body_schema(service, limits), **({"example": body} if body["inputs"] else {})}
    outputs = {"type": "array", "items": service.answer}
    answer = {"type": "object", "required": ["outputs"], "properties": {"outputs": outputs}}
    predict = {
        "operationId": "predict",
        "summary": "Answer one input or several",
        "description": "The outputs are in the order of the inputs. All are answered, or none.",
        "requestBody": {"required": True, "content": {"application/json": request}},
        "responses": {
            "200": _body("The answers.", answer),
            **_refusals(
                {
                    400: "The body is no JSON.",
                    408: "The body came too slowly.",
                    413: f"The body has more than {limits.body} bytes.",
                    415: "The body is of another type than application/json.",
                    422: "An input breaks the schema, or cannot be read.",
                    500: "The model failed.",
                    503: "Too many requests at the same time, or the service is ending.",
                }
            ),
        },
    }
    stream = {
        **predict,
        "operationId": "stream",
        "summary": "Answer one input as it is written",
        "description": "Server-sent events: data with the next part of the text, then the event end with the output, "
        "or the event error.",
        "responses": {**predict["responses"], "200": _text("The events.", "text/event-stream")},  # type: ignore[dict-item]
    }
    health = {"type": "object", "required": ["status"], "properties": {"status": {"enum": ["ok", "broken"]}}}
    paths: dict[str, Any] = {
        "/predict": {"post": predict},
        **({} if service.listen is None else {"/stream": {"post": stream}}),
        "/healthz": _get(
            "health",
            "Whether the service is at work; needs no token",
            {"200": _body("It is.", health), "503": _body("It is not.", health)},
        ),
        "/metrics": _get("metrics", "Counters for Prometheus", {"200": _text("The counters.", "text/plain")}),
        "/openapi.json": _get("openapi", "This document", {"200": _body("It.", {"type": "object"})}),
        "/docs": _get("docs", "The interface as a page", {"200": _text("The page.", "text/html")}),
    }
    components: dict[str, Any] = {"schemas": {"Refusal": _REFUSAL}}
    whole: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version, "description": service.item.get("description", "")},
        "paths": paths,
    }
    for path, operations in paths.items():
        for operation in operations.values():
            head = {400: "The request does not name this host.", 431: "Its line and headers are too large."}
            operation["responses"] |= _refusals(head)
            if has_token and path != "/healthz":
                operation["responses"] |= _refusals({401: "There is no token, or a wrong one."})
                operation["security"] = [{"token": []}]
    if has_token:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    return {**whole, "components": components}


_REFUSAL = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "string", "description": "One line: the value and the rule."}},
}


def _get(name: str, summary: str, responses: dict[str, Any]) -> dict[str, Any]:
    return {"get": {"operationId": name, "summary": summary, "responses": responses}}


def _body(description: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _text(description: str, kind: str) -> dict[str, Any]:
    return {"description": description, "content": {kind: {"schema": {"type": "string"}}}}


def _refusals(reasons: Mapping[int, str]) -> dict[str, Any]:
    return {str(status): _body(why, {"$ref": "#/components/schemas/Refusal"}) for status, why in reasons.items()}


def page(document: Mapping[str, Any], url: str) -> str:
    """Return the interface as a page: it loads nothing and runs nothing.

    Args:
        document: the value of ``document``.
        url: address of the service, for the example.
    """
    info, predict = document["info"], document["paths"]["/predict"]["post"]
    request = predict["requestBody"]["content"]["application/json"]
    body = json.dumps(request.get("example", {"inputs": []}), ensure_ascii=False)
    token = ' \\\n  -H "Authorization: Bearer $(cat token)"' if "security" in predict else ""
    curl = f"curl {url}/predict{token} \\\n  -H 'Content-Type: application/json' \\\n  -d '{body}'"
    schema = request["schema"]["properties"]["inputs"]
    answer = predict["responses"]["200"]["content"]["application/json"]["schema"]["properties"]["outputs"]
    return template(Path(__file__).with_name("interface.html")).render(
        info=info,
        predict=predict,
        curl=curl,
        most=schema["maxItems"],
        item=_pretty(schema["items"]),
        answer=_pretty(answer["items"]),
        reads={path: own["get"]["summary"] for path, own in document["paths"].items() if "get" in own},
    )


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


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
    listen: Any = None,
) -> Any:
    """Return the application; it starts the batcher when it starts, and stops it when it ends.

    Args:
        reader: reads bodies.
        batcher: answers inputs.
        interface: the OpenAPI document.
        limits, metrics, token, names: see ``Guard``.
        listen: of the ``Service``.
    """
    import torch
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, Response, StreamingResponse
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

    async def stream(request: Request) -> Response:
        body = await read_body(request, limits)
        loop, told = asyncio.get_running_loop(), asyncio.Queue[str | None]()
        inputs = await loop.run_in_executor(readers, reader.inputs, body)
        if len(inputs) != 1:
            raise Refused(422, f"a stream has one input, not {len(inputs)}")
        assert listen is not None
        value = listen(inputs[0], lambda text: loop.call_soon_threadsafe(told.put_nowait, text))
        taken = batcher.submit([value])
        answer = asyncio.wrap_future(taken)
        answer.add_done_callback(lambda _: told.put_nowait(None))

        async def events() -> AsyncIterator[str]:
            sent = ""
            try:
                while (text := await told.get()) is not None:
                    if len(text) > len(sent):  # an input that is tried once more begins again
                        yield _event("", {"text": text[len(sent) :]})
                        sent = text
            finally:
                batcher.abandon(taken)  # of a client that is gone, whose place another has now
            error = answer.exception()
            if error is None:
                yield _event("end", {"outputs": answer.result()})
            else:
                yield _event("error", {"error": f"the model failed on an input ({type(error).__name__})"})

        return StreamingResponse(events(), media_type="text/event-stream", headers={"cache-control": "no-store"})

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
        *([] if listen is None else [Route("/stream", stream, methods=["POST"])]),
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


def _event(name: str, value: Any) -> str:
    """Return a server-sent event."""
    line = f"event: {name}\n" if name else ""
    return f"{line}data: {json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(',', ':'))}\n\n"


def _json(status: int, value: Any, headers: Mapping[str, str] | None = None) -> Any:
    from starlette.responses import Response

    # A number that is none would be no JSON; the error is the service's, and better than a wrong answer.
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(text, status, headers, "application/json")


def _refusal(refused: Refused) -> Any:
    return _json(refused.status, {"error": refused.line}, refused.headers)
