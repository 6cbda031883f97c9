"""What happens to one table between its readers and the sink: its life, its queue, and the workers that write it."""
