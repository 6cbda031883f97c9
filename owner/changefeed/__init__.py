"""The life of one changefeed: its record, its run, its source and its load."""
