"""Embedding tables on several processes, and tables that grow."""
