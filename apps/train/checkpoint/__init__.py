"""Checkpoints: their contents, their places, and resuming a run from one."""
