"""Prefect flows: wiring that reads like the algorithm."""
