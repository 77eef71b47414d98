"""The servers and workers of a machine, started and stopped together: `ddpo server`."""
