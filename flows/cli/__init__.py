"""The `ddpo` command."""
