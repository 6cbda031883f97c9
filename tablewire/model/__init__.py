"""Values without I/O: what a span, a checkpoint, a barrier and a message are."""
