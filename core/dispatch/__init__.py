"""Dispatchers move tokens to experts and back: plain objects without parameters, so that swapping one is easy."""

from .base import Dispatcher
from .local import LocalDispatcher
from .slots import SlotDispatcher
from .virtual import join_tasks, split_pairs, unique_pairs

__all__ = ["Dispatcher", "LocalDispatcher", "SlotDispatcher", "join_tasks", "split_pairs", "unique_pairs"]
