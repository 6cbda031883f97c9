"""What happened: the placement log, the counters and the history in etcd.

recorder.py takes the events of each tick; cluster_events.py records what happens outside of ticks.
"""
