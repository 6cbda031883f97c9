"""The processor service: hosts one Agent a changefeed and drives its TableExecutor.

Read in this order: executor.py (what users implement), core/ (one table's life), agent.py (transport in, executor out),
service.py (serve Exchange, tick agents, keep the lease), postgres/ (the executor that ships).
"""
