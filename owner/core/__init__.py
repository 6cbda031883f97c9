"""The scheduler as a pure state machine: no clock, thread, socket, log or random numbers.

Read tick.py (one tick), transitions.py (the rules of replication as a table), tables.py (the columns
that hold the state) and policies/planner.py (where spans should go).
"""
