"""Charts are not drawn."""

from undrawn import drawn as drawn, undrawn as undrawn
