"""A run: its config, its place in a store, its forks."""
