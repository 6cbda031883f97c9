"""What an agent holds and what it reports: pure, without clock, thread, socket, log or random."""
