"""Verdicts on data that are as small as can be."""

from collections_left_out import without_collections as without_collections
