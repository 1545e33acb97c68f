"""Dispatchers move tokens to experts and back: plain objects without parameters, so that swapping one is easy."""

from .base import Dispatcher
from .local import LocalDispatcher
from .slots import SlotDispatcher
from .tasks import TaskDispatcher, join_tasks

__all__ = ["Dispatcher", "LocalDispatcher", "SlotDispatcher", "TaskDispatcher", "join_tasks"]
