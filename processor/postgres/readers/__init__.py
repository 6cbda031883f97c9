"""How changes and first copies get from a source into the queues of tables and to the sink: one thread for each reader."""
