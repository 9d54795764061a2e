"""GET /health for load balancers, and GET /metrics for Prometheus. Each app has its own registry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qvera.serve.api.service import require, service_of
from qvera.serve.requests import EngineStats

if TYPE_CHECKING:
    from qvera.serve.fine_tuning.jobs import Jobs

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters of the HTTP side. The engine's numbers are read whenever somebody asks."""

    def __init__(self, stats: Callable[[], EngineStats], jobs: Jobs | None = None) -> None:
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
        self._registry.register(_EngineCollector(stats))
        if jobs is not None:
            self._registry.register(_JobCollector(jobs))

    def text(self) -> bytes:
        """All numbers in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
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


class _JobCollector(Collector):
    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    def collect(self) -> Iterator[Metric]:
        gauge = GaugeMetricFamily("qvera_fine_tuning_jobs", "Fine-tuning jobs.", labels=["status"])
        counts = self._jobs.database.counts()
        counts["running"] = counts.get("running", 0) + counts.pop("finishing", 0)
        for status, count in counts.items():
            gauge.add_metric([status], count)
        yield gauge
        tokens = self._jobs.worker.tokens
        yield CounterMetricFamily("qvera_training_tokens", "Tokens of rows that were trained on.", tokens)


router = APIRouter()


@router.get("/health", response_model=None)
async def health(request: Request) -> Response:
    """200 while the server takes calls; 503 once it stops, or where its engine has ended."""
    service = service_of(request)
    stats = await service.in_thread(service.engine.stats, "quick")
    status = "draining" if service.draining else "ok" if stats.dead is None else "dead"
    return JSONResponse({"status": status}, 200 if status == "ok" else 503)


@router.get("/metrics", response_model=None)
async def metrics(request: Request) -> Response:
    """Numbers in Prometheus' text format."""
    require(request, "use")
    service = service_of(request)
    text = await service.in_thread(service.metrics.text, "disk")
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
