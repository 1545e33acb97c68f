"""Parallel and plain text: corpora, the readers of their files, and batches of token ids."""
