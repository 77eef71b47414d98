"""The commands of `ddpo`, a module for each matter; `flows/cli.py` puts them together."""
