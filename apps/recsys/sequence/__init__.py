"""Histories of clicks: the next item a user takes."""
