"""A training step: the module, its losses, and the measurements."""
