"""Measurements: each is a command that prints the figures of docs/."""
