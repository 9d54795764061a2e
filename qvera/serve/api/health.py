"""GET /health for balancers, GET /metrics for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from qvera.serve.api.service import require, service_of

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
