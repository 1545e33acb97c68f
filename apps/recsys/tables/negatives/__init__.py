"""Negatives: sampled rows and items, their draws and weights."""
