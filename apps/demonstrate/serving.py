"""The server of the page: for this machine alone, and without a request to any other."""

from __future__ import annotations

import asyncio
import logging
import webbrowser
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from apps.base.ports import LOCAL, bound, host_of, url_of

PORT = 7860
_NAMES = [LOCAL, "localhost"]

POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; form-action 'self'; frame-ancestors 'none'"
"""The content security policy of the page: the browser loads nothing from elsewhere, whatever a library asks for."""


def serve(app: Any, port: int, opens: bool) -> None:
    """Serve a page until the process is interrupted, and print its address.

    Args:
        app: that of ``local_app``.
        port: port; 0: a free one.
        opens: whether the page is shown in the browser.
    """
    with bound(port) as listening:
        print(f"demo: {url_of(listening)} (Ctrl-C ends it)", flush=True)
        if opens:
            webbrowser.open(url_of(listening))  # the browser waits until the server answers
        server_of(app).run(sockets=[listening])


def server_of(app: Any) -> Any:
    """Return the uvicorn server of ``app``, which prints nothing but errors."""
    import uvicorn

    config = uvicorn.Config(app, log_level="error", access_log=False, ws="none", timeout_graceful_shutdown=1)
    logging.getLogger("uvicorn.error").addFilter(_is_no_farewell)  # after the Config, which sets up the log
    return uvicorn.Server(config)


def _is_no_farewell(record: logging.LogRecord) -> bool:
    """Tell whether a record is none of a page that was open when the server ended."""
    cancelled = bool(record.exc_info) and isinstance(record.exc_info[1], asyncio.CancelledError)  # type: ignore[index]
    return not cancelled and not record.getMessage().startswith("Cancel ")


def local_app(blocks: Any, **appearance: Any) -> Any:
    """Return the application of a page of Gradio's, which answers requests of this machine alone.

    Gradio's own ``launch`` is not used: it can share a page, and asks its own address before it starts.

    Args:
        blocks: the page.
        appearance: theme and css of ``gradio.mount_gradio_app``.
    """
    import gradio
    from fastapi import FastAPI

    app = FastAPI(openapi_url=None)
    gradio.mount_gradio_app(
        app,
        blocks,
        path="/",
        server_name=LOCAL,
        footer_links=[],
        run_history=False,
        show_error=True,
        max_file_size="50mb",
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        **appearance,
    )
    return _guarded(app)


Message = MutableMapping[str, Any]
Channel = Callable[..., Awaitable[Any]]


def _guarded(app: Any) -> Any:
    """Return ``app`` with ``POLICY`` in the head of each answer; it answers only requests of this page or of no page.

    A page of another site could otherwise read answers by a name of its own for 127.0.0.1, and upload and call by any.
    """
    from starlette.responses import PlainTextResponse

    async def answered(scope: Message, receive: Channel, send: Channel) -> None:
        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        answering, headers = app, dict(scope.get("headers", ()))
        if scope["type"] == "http" and host_of(scope["headers"]) not in _NAMES:
            answering = PlainTextResponse("host is none of this page's names: " + ", ".join(_NAMES), 400)
        elif headers.get(b"origin") not in (None, b"http://" + headers.get(b"host", b"")):
            answering = PlainTextResponse("the page of another origin has sent this request", 403)
        await answering(scope, receive, with_policy)

    return answered
