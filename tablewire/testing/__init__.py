"""A test kit: a network in one thread, a scripted executor, and a sink that counts writers."""

from tablewire.testing.fake_executor import FakeCall, FakeTableExecutor, UnfencedFakeTableExecutor
from tablewire.testing.fake_sink import FakeSink
from tablewire.testing.loopback import Deliver, LoopbackNetwork

__all__ = ["Deliver", "FakeCall", "FakeSink", "FakeTableExecutor", "LoopbackNetwork", "UnfencedFakeTableExecutor"]
