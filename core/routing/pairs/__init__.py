"""Routers that choose pairs of token and expert."""
