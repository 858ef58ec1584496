"""Liveness, readiness, status and metrics: `/livez`, `/readyz`, `/v1/status`, `/metrics`."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import Response

from service import metrics
from service.errors import RequestError
from service.inference.server import Server
from service.protocols.schemas import BackboneStatus, StatusResponse
from service.web.responses import json_response


async def livez(request: Request, server: Server) -> Response:
    """`GET /livez`: 200 unless an engine has stopped: then the process must be replaced."""
    server.check_alive()
    return Response("\n", media_type="text/plain")


async def readyz(request: Request, server: Server) -> Response:
    """`GET /readyz`: 200 from the first model that passed its golden images until SIGTERM."""
    server.check_healthy()
    return Response("\n", media_type="text/plain")


async def status(request: Request, server: Server) -> Response:
    """`GET /v1/status`: health with its reason, and the load of every engine."""
    current = server.repository.current
    reason = ""
    try:
        server.check_healthy()
    except RequestError as error:
        reason = error.message
    versions = [model for served in current.models.values() for model in served.versions.values()]
    backbones = [
        BackboneStatus(
            fingerprint=one.fingerprint,
            device=one.engine.info.device,
            engine=one.engine.info.engine,
            precision=one.engine.info.precision,
            batch_size=one.engine.info.batch_size,
            num_streams=one.engine.info.num_streams,
            images_per_second=round(one.batcher.images_per_second, 1),
            queue_images=one.batcher.num_admitted,
            stalled_seconds=round(one.batcher.stalled_seconds(), 3),
            num_versions=sum(model.backbone.fingerprint == one.fingerprint for model in versions),
        )
        for one in current.backbones
    ]
    return json_response(
        StatusResponse(
            ready=not reason,
            alive=not server.is_stalled(),
            draining=server.is_draining,
            reason=reason,
            uptime_seconds=round(time.time() - server.started, 1),
            num_models=len(current.models),
            num_refused=len(current.refused),
            buffered_bytes=server.memory_budget.num_bytes,
            backbones=backbones,
        )
    )


async def prometheus(request: Request, server: Server) -> Response:
    """`GET /metrics`: the metrics in Prometheus' text format."""
    current = server.repository.current
    text = metrics.render(
        ((backbone.batcher.name, backbone.batcher.num_admitted) for backbone in current.backbones),
        sorted(current.versions),
    )
    return Response(text, headers={"Content-Type": metrics.CONTENT_TYPE})
