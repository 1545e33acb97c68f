"""Encodings of tables: how they are built, checked and cut into splits."""
