"""State, rollouts and credit to the next state."""
