"""Pairs of images and texts: files, splits, encodings, batches."""
