"""What leaves a run: pretrained folders, model cards, exported graphs, predictions."""
