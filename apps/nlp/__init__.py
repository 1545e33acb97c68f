"""Sparse translation and language models: parallel corpora and plain text to transformers with mixtures of experts."""
