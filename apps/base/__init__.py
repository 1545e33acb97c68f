"""What every room uses and what knows nothing of models: files, messages, the machine, quiet libraries."""
