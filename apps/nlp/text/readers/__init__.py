"""Parallel text as it lies on disk, turned into aligned rows."""
