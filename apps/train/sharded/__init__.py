"""Training on several processes with sharded experts, parameters and tables."""
