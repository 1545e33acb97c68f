"""Readers of images with captions: from the files of a dataset to its pairs."""
