"""Garbage is not looked for during the imports of a program, nor afterwards in what they left."""

from __future__ import annotations

import subprocess
import sys

from places import environment

PROGRAM = """
import gc
from apps.base.imports import importing
states = [gc.isenabled()]
try:
    with importing():
        states.append(gc.isenabled())
        imported = []
        raise ImportError("as a wrong class in a configuration")
except ImportError:
    states.append(gc.isenabled())
count, tracked = gc.get_freeze_count(), any(o is imported for o in gc.get_objects())
later = []
with importing():
    states.append(gc.isenabled())
print(states, count > 1000, tracked, gc.get_freeze_count() == count, any(o is later for o in gc.get_objects()))
"""


def test_only_the_first_imports_of_a_program_are_kept_from_collection():
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    # On, off for the imports, on again, and on in a second call; the list made among the imports is out of reach.
    assert done.stdout == "[True, False, True, True] True False True True\n"
