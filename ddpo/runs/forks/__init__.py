"""A run that starts from a checkpoint and the saved rollouts of another."""
