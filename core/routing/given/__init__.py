"""Routers without learned scores: by hash, position, task, domain or cluster."""
