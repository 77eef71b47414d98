"""Forks: runs that start from a checkpoint and the saved rollouts of another run, their parent."""
