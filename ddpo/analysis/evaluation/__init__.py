"""Checkpoints compared on fixed prompts and seeds."""
