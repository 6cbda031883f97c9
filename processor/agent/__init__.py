"""One agent: messages of the owner in, calls of a TableExecutor out."""

from processor.agent.agent import Agent, AgentConfig, new_agent

__all__ = ["Agent", "AgentConfig", "new_agent"]
