"""``moesaic serve``: a trained model answers requests over HTTP.

The modules, from the ground up: ``options`` (the command line), ``token``, ``limits``, ``reading`` (a body's bytes to
inputs), ``batching`` (inputs of several requests to one batch), ``metrics``, ``guard`` (who may ask, and how much),
``interface`` (OpenAPI, and a page), ``application`` (the paths), ``protocol`` (connections, and the server),
``command`` (the whole).
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run ``moesaic serve ARGV`` until it is stopped by SIGTERM or Ctrl-C.

    Returns:
        0; 1 where the model has broken down.
    """
    from apps.base.imports import importing
    from apps.serve.service.options import Options

    options = Options.read(argv)  # a wrong one ends here, before torch is imported

    with importing():
        from apps.serve.service.command import run

    return run(options)
