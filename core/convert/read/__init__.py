"""What is read from a network: its FFNs, hidden units, names and neurons."""
