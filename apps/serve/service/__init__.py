"""``moesaic serve``: a trained model answers requests over HTTP."""
