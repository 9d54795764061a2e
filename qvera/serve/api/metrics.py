"""The numbers of GET /metrics, for Prometheus. Each app has its own registry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qvera.serve.requests import EngineStats

if TYPE_CHECKING:
    from qvera.serve.fine_tuning.jobs import Jobs

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics(Collector):
    """Counters of the HTTP side. The numbers of the engine and of jobs are read whenever somebody asks."""

    def __init__(self, stats: Callable[[], EngineStats], jobs: Jobs | None) -> None:
        self._stats, self._jobs = stats, jobs
        self._registry = CollectorRegistry()
        self.calls = Counter(
            "qvera_calls", "HTTP calls that were answered.", ("path", "status"), registry=self._registry
        )
        self.first_token_seconds = Histogram(
            "qvera_time_to_first_token_seconds",
            "From a call's arrival to its first token.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.call_seconds = Histogram(
            "qvera_call_seconds", "From a call's arrival to its end.", buckets=_SECONDS, registry=self._registry
        )
        self._registry.register(self)

    def text(self) -> bytes:
        """All numbers in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Give the registry the numbers of the engine and of jobs."""
        stats = self._stats()
        for name, text, value in (
            ("requests_running", "Requests that have a place in the batch.", stats.running),
            ("requests_waiting", "Requests that wait for a place.", stats.waiting),
            ("adapters_resident", "Adapters whose vectors are on the device.", stats.adapters_resident),
            ("adapter_slots", "Adapters that have room on the device.", stats.adapter_slots),
            ("adapter_bytes", "Bytes of all slots for adapters, used or not.", stats.bank_bytes),
            ("engine_up", "1 while the engine takes requests.", int(stats.dead is None)),
        ):
            yield GaugeMetricFamily(f"qvera_{name}", text, value)
        counters: tuple[tuple[str, str, float], ...] = (
            ("prompt_tokens", "Tokens of prompts.", stats.prompt_tokens),
            ("generated_tokens", "Tokens of answers.", stats.generated_tokens),
            ("requests_finished", "Requests that have ended.", stats.finished),
            ("training_seconds", "Time that fine-tuning jobs took.", stats.background_seconds),
        )
        for name, text, count in counters:
            yield CounterMetricFamily(f"qvera_{name}", text, count)
        if self._jobs is None:
            return
        gauge = GaugeMetricFamily("qvera_fine_tuning_jobs", "Fine-tuning jobs.", labels=["status"])
        counts = self._jobs.database.counts()
        counts["running"] = counts.get("running", 0) + counts.pop("finishing", 0)  # as the API shows them
        for status, jobs in counts.items():
            gauge.add_metric([status], jobs)
        yield gauge
        tokens = self._jobs.worker.tokens
        yield CounterMetricFamily("qvera_training_tokens", "Tokens of rows that were trained on.", tokens)
