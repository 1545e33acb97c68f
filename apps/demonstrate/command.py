"""The whole of ``moesaic demo``: load the model, ask its app what its page has, and serve the page."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from apps import registry
from apps.base.messages import one_line
from apps.base.quiet import quiet
from apps.demonstrate.examples import with_examples
from apps.demonstrate.options import Options
from apps.demonstrate.page import appearance, build_page
from apps.demonstrate.serving import local_app, serve
from apps.train.checkpoint.loading import load
from apps.train.checkpoint.paths import run_name
from apps.train.checkpoint.stopping import on_signal


def run(options: Options) -> int:
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
