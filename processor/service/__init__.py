"""The processor service: serves Exchange, ticks agents, keeps its registration and lease."""
