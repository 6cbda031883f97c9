"""Who leads, for how long, and what a leader must not do."""
