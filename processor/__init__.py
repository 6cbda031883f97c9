"""The processor service: hosts an Agent for each changefeed, which drives a TableExecutor.

Read in this order: tablewire/executor.py (what users implement), core/table_life.py (one table's life), core/span_table.py and
core/reports.py (what an agent holds and reports), agent/executor_driver.py (the calls of the executor), agent/agent.py (messages
in, reports out), service/ (serve Exchange, tick agents, keep the lease), postgres/ (the executor that ships).
"""

from processor.agent.agent import Agent, AgentConfig, new_agent
from tablewire.executor import TableExecutor

__all__ = ["Agent", "AgentConfig", "TableExecutor", "new_agent"]
