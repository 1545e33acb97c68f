"""Routers that mix tokens."""
