"""The thread-safe face of the scheduler core, and the snapshots that readers get."""
