"""What happened: the log, the metrics and the history of events."""
