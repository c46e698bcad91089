"""What Prometheus learns about a replica."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.process_collector import ProcessCollector

from finetune.api.status import Phase
from finetune.controller.cluster.resources import FINETUNEJOBS
from finetune.controller.cluster.store import Store

_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)


class Metrics:
    """The counters, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.reconcile_seconds = Histogram(
            "finetune_reconcile_seconds", "Duration of one visit to one job.", registry=self.registry, buckets=_BUCKETS
        )
        self.writes = Counter(
            "finetune_api_writes", "Requests that change something.", ["verb", "kind"], registry=self.registry
        )
        self.reports = Counter(
            "finetune_progress_reports", "Progress reports of pods.", ["result"], registry=self.registry
        )
        ProcessCollector(registry=self.registry)

    def count_write(self, verb: str, path: str) -> None:
        """Count a request by the plural of its kind, and the subresource where there is one."""
        parts = path.split("/")
        kind = parts[parts.index("namespaces") + 2] if "namespaces" in parts else parts[-1]
        kind += "/status" if parts[-1] == "status" else ""
        self.writes.labels(verb, kind).inc()

    def show(
        self, store: Store, depth: Callable[[], int], leading: Callable[[], bool], unknown: Callable[[], int]
    ) -> None:
        """Add the gauges that are read when Prometheus asks."""
        self.registry.register(_Gauges(store, depth, leading, unknown))

    def page(self) -> bytes:
        return generate_latest(self.registry)


class _Gauges:
    def __init__(
        self, store: Store, depth: Callable[[], int], leading: Callable[[], bool], unknown: Callable[[], int]
    ) -> None:
        self._store, self._depth, self._leading, self._unknown = store, depth, leading, unknown

    def collect(self) -> Iterable[GaugeMetricFamily]:
        yield GaugeMetricFamily("finetune_queue_depth", "Jobs that wait for a visit.", value=self._depth())
        yield GaugeMetricFamily("finetune_leading", "Whether this replica leads.", value=float(self._leading()))
        yield GaugeMetricFamily(
            "finetune_definition_unknown_fields",
            "Fields and words of the API that the served definition does not know; they are not written.",
            value=self._unknown(),
        )
        phases = Tally((job.get("status") or {}).get("phase", Phase.PENDING) for job in self._store.jobs())
        jobs = GaugeMetricFamily("finetune_jobs", f"{FINETUNEJOBS.kind}s by phase.", labels=["phase"])
        for phase in Phase:
            jobs.add_metric([phase], phases.get(phase, 0))
        yield jobs
