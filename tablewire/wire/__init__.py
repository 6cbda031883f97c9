"""The wire format: how a message becomes bytes, and which versions two processes share."""
