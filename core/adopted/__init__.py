"""MoE blocks of other libraries' models, adopted where they are: recorded, balanced and computed by this engine."""

from .in_place import adopt, is_sparse, release
from .layouts import LAYOUTS, Layout, register_layout

__all__ = ["LAYOUTS", "Layout", "adopt", "is_sparse", "register_layout", "release"]
