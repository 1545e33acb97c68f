"""Rows on their way to the model, and predictions on their way out."""
