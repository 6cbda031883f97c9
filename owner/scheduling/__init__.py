"""The scheduler as threads use it, and the snapshots that it publishes."""
