"""Prefect tasks, one a file: read references, call ``ddpo``, commit, return a reference."""
