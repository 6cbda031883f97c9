"""What happened: the placement log, the counters and the history in etcd.

recorder.py is where the events of a tick come in; limiter.py bounds them; cluster_events.py records everything else.
"""
