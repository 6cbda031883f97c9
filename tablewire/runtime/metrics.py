"""Metrics of one process, with a registry of its own, called `tablewire_<service>_...`.

A family has few labels with few values (changefeed, state, reason), never a table or a span. Any
thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import TypeAlias, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, GCCollector, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

NAMESPACE = "tablewire"
SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

Samples: TypeAlias = Iterable[tuple[Sequence[str], float]]
"""The values of the labels, and the value."""

_F = TypeVar("_F", bound=MetricWrapperBase)


class Metrics:
    """The registry and the families of a process. service: "owner" or "processor"."""

    def __init__(self, service: str, version: str) -> None:
        self.service = service
        self.registry = CollectorRegistry()
        self._families: list[MetricWrapperBase] = []
        self._lock = threading.Lock()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        build = Gauge(f"{NAMESPACE}_build_info", "Always 1", ["service", "version"], registry=self.registry)
        build.labels(service, version).set(1)

    def counter(self, name: str, doc: str, labels: Sequence[str] = ()) -> Counter:
        """Add a counter. name: without the prefix and without `_total`."""
        return self._keep(Counter(self._full(name), doc, labels, registry=self.registry))

    def gauge(self, name: str, doc: str, labels: Sequence[str] = ()) -> Gauge:
        return self._keep(Gauge(self._full(name), doc, labels, registry=self.registry))

    def histogram(self, name: str, doc: str, labels: Sequence[str] = (), buckets: Sequence[float] = SECONDS_BUCKETS) -> Histogram:
        return self._keep(Histogram(self._full(name), doc, labels, registry=self.registry, buckets=buckets))

    def forget(self, **labels: str) -> None:
        """Remove the children with all of these labels, such as changefeed="default/orders"."""
        with self._lock:
            families = list(self._families)
        for family in families:
            names = family._labelnames
            if not labels.keys() <= set(names):
                continue
            samples = [sample.labels for metric in family.collect() for sample in metric.samples]
            for values in {tuple(sample[name] for name in names) for sample in samples if labels.items() <= sample.items()}:
                family.remove(*values)

    def _full(self, name: str) -> str:
        return f"{NAMESPACE}_{self.service}_{name}"

    def _keep(self, family: _F) -> _F:
        with self._lock:
            self._families.append(family)
        return family


class ReadMetrics(Collector):
    """Metrics of which some are read when Prometheus asks, by `collect`, so that no tick pays for them.

    A subclass registers itself in `registry` behind its other families.
    """

    def __init__(self, service: str, version: str) -> None:
        self.metrics = Metrics(service, version)
        self.registry = self.metrics.registry
        self.prefix = f"{NAMESPACE}_{service}"

    def describe(self) -> Iterable[Metric]:
        """Return nothing: the families depend on what runs."""
        return ()

    def gauge(self, name: str, doc: str, samples: Samples, labels: Sequence[str] = ()) -> Metric:
        return _filled(GaugeMetricFamily(f"{self.prefix}_{name}", doc, labels=labels), samples)

    def counter(self, name: str, doc: str, samples: Samples, labels: Sequence[str] = ()) -> Metric:
        """Return a counter. name: without `_total`."""
        return _filled(CounterMetricFamily(f"{self.prefix}_{name}", doc, labels=labels), samples)


def _filled(family: GaugeMetricFamily | CounterMetricFamily, samples: Samples) -> Metric:
    for values, value in samples:
        family.add_metric(values, value)
    return family
