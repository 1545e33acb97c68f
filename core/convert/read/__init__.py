"""Read a network: its FFNs, hidden units, names and neurons."""
