"""Smaller networks made from sparse ones: merged, pruned, dense."""
