"""Columns of a table as numbers, and what training has taught of their values."""
