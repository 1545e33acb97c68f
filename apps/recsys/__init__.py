"""Recommenders: tables of users, items and several labels, and histories of clicks."""
