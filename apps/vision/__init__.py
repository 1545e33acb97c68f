"""Image classification: V-MoE, its data and its metrics."""
