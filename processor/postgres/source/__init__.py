"""What a source sends: its catalogue, its replication connections, and the messages of pgoutput."""
