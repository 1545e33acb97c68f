"""Sparse translation models, their data and their test report."""
