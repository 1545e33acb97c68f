"""A blend: the weighted mean of a network's predictions and of boosted trees' that are trained on the same rows."""
