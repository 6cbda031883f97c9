"""The pure core of an agent: no clock, thread, socket, log or random; numpy and tablewire.model alone."""
