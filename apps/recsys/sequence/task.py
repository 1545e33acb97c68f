"""The task of this room's model, by its modules ``service``, ``exhibit`` and ``export``."""

from apps.recsys.sequence.sizes import Sized
from apps.task.legacy import room_task


class TASK(Sized, room_task("apps.recsys.sequence")):  # type: ignore[misc]
    """The use of a ``NextItemRecommender``."""
