"""Outputs of a run: pretrained folders, model cards, exported graphs, predictions."""
