"""The cost of a model: parameters, FLOPs and memory, and how to make it cheaper."""
