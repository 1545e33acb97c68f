"""Models of transformers: their experts computed by the kernels of this engine. transformers is imported when asked."""

from .adapter_files import load_adapters, save_adapters
from .experts import register

__all__ = ["load_adapters", "register", "save_adapters"]
