"""The parts of ``moesaic bench soak``, which share what tests are made of."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tests" / "support"))
