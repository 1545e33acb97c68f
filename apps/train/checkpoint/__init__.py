"""Checkpoints: what they hold, where they lie, how a run resumes from one."""
