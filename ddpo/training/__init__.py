"""From state, samples and credit to the next state: one loop for all algorithms (`loop.py`)."""
