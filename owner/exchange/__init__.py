"""The calls to the processors: one client for each, one hub for all."""
