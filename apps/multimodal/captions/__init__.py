"""Captions: a decoder that reads an image's tokens and writes a text about it, sparse or dense."""
