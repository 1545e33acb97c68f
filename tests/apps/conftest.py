"""What the tests of all apps share."""

from undrawn import drawn as drawn
from undrawn import undrawn as undrawn
