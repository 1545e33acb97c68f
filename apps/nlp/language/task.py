"""The task of this room's model, by its modules ``service``, ``exhibit`` and ``export``."""

from apps.task.legacy import room_task

TASK = room_task("apps.nlp.language")
