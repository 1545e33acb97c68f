"""What a model costs: parameters, FLOPs and memory, and how to make it cheaper."""
