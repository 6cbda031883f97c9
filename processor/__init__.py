"""The processor service: hosts one Agent a changefeed and drives its TableExecutor.

Read in this order: executor.py (what users implement), core/table.py (one table's life), core/holdings.py and core/reports.py
(what an agent holds and says), driver.py (the calls of the executor), agent.py (transport in, executor out), service.py (serve
Exchange, tick agents, keep the lease), postgres/ (the executor that ships).
"""

from processor.agent.agent import Agent, AgentConfig, new_agent
from tablewire.executor import TableExecutor

__all__ = ["Agent", "AgentConfig", "TableExecutor", "new_agent"]
