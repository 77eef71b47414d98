"""Looking after a store: retention, verification, sweeping, probing."""
