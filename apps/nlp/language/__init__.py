"""Sparse language models on plain text."""
