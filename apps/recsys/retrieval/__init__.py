"""Retrieval: two towers that map users and items to vectors, and the exact search for a user's nearest items."""
