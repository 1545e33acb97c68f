"""What the tests of all apps share."""

from undrawn import drawn as drawn, undrawn as undrawn
