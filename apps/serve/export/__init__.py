"""``moesaic export``: a trained model as a graph for onnxruntime, ``torch.export`` or AOTInductor.

The command: ``options`` (its line), ``files`` (what it writes, whole or not at all), ``command`` (the whole). The
formats: ``onnx``, ``operators``, ``contrib`` and ``programs``.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run ``moesaic export ARGV``."""
    from apps.serve.export.options import Options

    options = Options.read(argv)  # a wrong one ends here, before torch is imported

    from apps.serve.export.command import run

    return run(options)
