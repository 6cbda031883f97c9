"""The thread-safe face of the scheduler core, and the snapshots that it publishes."""
