"""The interface of a service, as an OpenAPI document and as a page; both are made from the app's JSON schemas."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apps.base.templates import template
from apps.serve.service.limits import Limits
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
        service: what is served.
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
            "200": _json("The answers.", answer),
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
    health = {"type": "object", "required": ["status"], "properties": {"status": {"enum": ["ok", "broken"]}}}
    paths: dict[str, Any] = {
        "/predict": {"post": predict},
        "/healthz": _get(
            "health",
            "Whether the service is at work; needs no token",
            {"200": _json("It is.", health), "503": _json("It is not.", health)},
        ),
        "/metrics": _get("metrics", "Counters for Prometheus", {"200": _text("The counters.", "text/plain")}),
        "/openapi.json": _get("openapi", "This document", {"200": _json("It.", {"type": "object"})}),
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


def _json(description: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _text(description: str, kind: str) -> dict[str, Any]:
    return {"description": description, "content": {kind: {"schema": {"type": "string"}}}}


def _refusals(reasons: Mapping[int, str]) -> dict[str, Any]:
    return {str(status): _json(why, {"$ref": "#/components/schemas/Refusal"}) for status, why in reasons.items()}


def page(document: Mapping[str, Any], url: str) -> str:
    """Return the interface as a page: it loads nothing and runs nothing.

    Args:
        document: that of ``document``.
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
