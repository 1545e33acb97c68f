"""Models of transformers: their experts computed by the kernels of this engine. transformers is imported when asked."""

from .experts import register

__all__ = ["register"]
