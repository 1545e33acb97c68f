"""The arrays of an encoded table."""

from apps.columns import ColumnFiles, ColumnWriter, Damaged

__all__ = ["ColumnFiles", "ColumnWriter", "Damaged"]
