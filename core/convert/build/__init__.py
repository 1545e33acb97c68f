"""Sparse networks made from dense ones."""
