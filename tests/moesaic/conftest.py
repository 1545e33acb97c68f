"""Charts are not drawn."""

from undrawn import drawn as drawn
from undrawn import undrawn as undrawn
