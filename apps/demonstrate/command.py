"""The command ``moesaic demo``: load the model, ask its app what its page has, and serve the page."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import tempfile
import webbrowser
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from apps import registry
from apps.base.messages import one_line
from apps.base.ports import LOCAL, bound, host_of, url_of
from apps.base.quiet import quiet
from apps.cli.configs import read_config
from apps.data.datasets import without_fetching
from apps.demonstrate.options import DemoOptions
from apps.demonstrate.page import appearance, build_page
from apps.report.exhibit import Exhibit
from apps.train.checkpoint.loading import check_beside, load
from apps.train.checkpoint.paths import run_name
from apps.train.checkpoint.stopping import on_signal
from core.config.plain import arguments_from_plain

_NAMES = [LOCAL, "localhost"]

POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; form-action 'self'; frame-ancestors 'none'"
"""The content security policy of the page: the browser loads nothing from elsewhere, whatever a library asks for."""


def serve(app: Any, port: int, opens: bool) -> None:
    """Serve a page until the process is interrupted, and print its address.

    Args:
        app: the value of ``local_app``.
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
    """Return the application of a page of Gradio's, which answers requests only of this machine.

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
        show_error=True,
        max_file_size="50mb",
        **dict.fromkeys(("run_history", "ssr_mode", "enable_monitoring", "pwa", "mcp_server"), False),
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


CONFIG = "config.yaml"


def with_examples(make: Any, model: Any, checkpoint: Path, most: int) -> tuple[Exhibit, str]:
    """Return the exhibit of a model with examples of its run's data, and a line on why it has none; else "".

    Args:
        make: the app's function ``exhibit(model, data, most)``.
        model: the model.
        checkpoint: its file, next to which the run's configuration may lie.
        most: number of examples at most; 0: the data are not read.
    """
    if not most:
        return make(model, None, 0), ""
    config = checkpoint.parent.parent / CONFIG
    if not config.is_file():
        return make(model, None, 0), f"no {CONFIG} lies beside {checkpoint}, and examples come from its data"
    try:
        with without_fetching():
            return make(model, data_of(config, model), most), ""
    except (ValueError, OSError, ImportError) as error:  # missing data does not prevent the page
        return make(model, None, 0), str(error)


def data_of(config: Path, model: Any) -> Any:
    """Return the data of a run, which read their files in the way of its model.

    Raises:
        ValueError: the configuration is damaged, names a class that is not the apps', or contradicts the model.
    """
    values = read_config(config)
    check_beside(values, config)
    section = values.get("data")
    section = {"class_path": section} if isinstance(section, str) else dict(section or {})
    name = section.get("class_path")
    if not isinstance(name, str) or registry.full_path(name) is None:
        raise ValueError(f"{config} names no data of the apps")
    kind = registry.resolve(name)
    given = {**arguments_from_plain(kind, section.get("init_args") or {}, "data")}
    given |= {name: getattr(model, name) for name in getattr(kind, "from_checkpoint", ()) if hasattr(model, name)}
    data = kind(**given)
    if model.encoding_state is not None and hasattr(data, "adopt"):
        data.adopt(model.encoding_state)
    return data


def run(options: DemoOptions) -> int:
    """Serve the page of a run's model until SIGTERM or SIGINT; no file of it is left then.

    Returns:
        0; at SIGTERM it exits with 143.

    Raises:
        ValueError: the checkpoint is damaged, or of a model that no app has or whose app has no page.
    """
    ends = on_signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with ends, tempfile.TemporaryDirectory(prefix="moesaic-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # else Gradio's own folder stays
        try:
            with quiet(own_notes=False):
                model = load(options.checkpoint)
                exhibit, note = with_examples(exhibit_of(model), model, options.checkpoint, options.examples)
                app = local_app(build_page(exhibit, run_name(options.checkpoint), Path(folder)), **appearance())
            print(f"checkpoint: {options.checkpoint}")
            if note:
                print(f"no examples: {one_line(note)}")
            try:
                serve(app, options.port, options.open)
            except KeyboardInterrupt:
                print("\ndemo: ended")
        finally:
            del os.environ["GRADIO_TEMP_DIR"]
    return 0


def exhibit_of(model: Any) -> Any:
    """Return the function ``exhibit`` of the app that a model is of.

    Raises:
        ValueError: no app has a page for such a model.
    """
    kind = registry.task_of(type(model), "demo")
    return lambda own, data, most: kind(own).exhibit(data, most)
