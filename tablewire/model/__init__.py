"""Values without I/O: ids, states, spans, progress, messages, queries. Nothing here imports anything but numpy."""
