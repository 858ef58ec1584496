"""Liveness, readiness, status and metrics: `/livez`, `/readyz`, `/v1/status`, `/metrics`."""

from __future__ import annotations

import time
from collections import Counter

from starlette.requests import Request
from starlette.responses import Response

from service import metrics
from service.errors import RequestError
from service.inference.repository import Backbone
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
    num_versions = Counter(
        model.backbone.fingerprint
        for served in current.models.values()
        for model in served.versions.values()
    )
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
            backbones=[
                _backbone_status(backbone, num_versions[backbone.fingerprint])
                for backbone in current.backbones
            ],
        )
    )


def _backbone_status(backbone: Backbone, num_versions: int) -> BackboneStatus:
    info, batcher = backbone.engine.info, backbone.batcher
    return BackboneStatus(
        fingerprint=backbone.fingerprint,
        device=info.device,
        engine=info.engine,
        precision=info.precision,
        batch_size=info.batch_size,
        num_streams=info.num_streams,
        images_per_second=round(batcher.images_per_second, 1),
        queue_images=batcher.num_admitted,
        stalled_seconds=round(batcher.stalled_seconds(), 3),
        num_versions=num_versions,
    )


async def prometheus(request: Request, server: Server) -> Response:
    """`GET /metrics`: the metrics in Prometheus' text format."""
    current = server.repository.current
    text = metrics.render(
        ((backbone.batcher.name, backbone.batcher.num_admitted) for backbone in current.backbones),
        sorted(current.versions),
    )
    return Response(text, headers={"Content-Type": metrics.CONTENT_TYPE})
