"""The series that Prometheus reads at /metrics.

Labels are bounded: routes as patterns, models that are loaded, codes of the error table. BentoML's
own metrics label by raw path, one series for every address a scanner tries (1.4.39), and are
switched off.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

# BentoML sets it for its own metrics. With it values live in files that processes share, and no
# series can be dropped. This is one process.
os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

# Other modules take it from here: no other may import prometheus_client, or some order of imports
# would do so before the line above.
CONTENT_TYPE = CONTENT_TYPE_LATEST
REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

REQUESTS = Counter("graft_requests", "Requests answered.", ("route", "status"), registry=REGISTRY)
REQUEST_SECONDS = Histogram(
    "graft_request_seconds",
    "From a request's headers to its answer.",
    ("route",),
    buckets=_SECONDS,
    registry=REGISTRY,
)
REJECTED = Counter(
    "graft_rejected",
    "Requests that got an error, by its code.",
    ("reason", "model", "version"),
    registry=REGISTRY,
)
IMAGES = Counter(
    "graft_images",
    "Images answered, readable or not.",
    ("model", "version", "outcome"),
    registry=REGISTRY,
)
PREDICT_SECONDS = Histogram(
    "graft_predict_seconds",
    "From a complete body to the scores.",
    ("model", "version"),
    buckets=_SECONDS,
    registry=REGISTRY,
)
SHADOW = Counter(
    "graft_shadow_images",
    "Images a shadow version was asked about too.",
    ("model", "version", "outcome"),
    registry=REGISTRY,
)
DECODE_SECONDS = Histogram(
    "graft_decode_seconds",
    "Encoded image to crop, of one image.",
    buckets=_SECONDS,
    registry=REGISTRY,
)
QUEUE_SECONDS = Histogram(
    "graft_queue_seconds",
    "Admission to the start of its batch, of one image.",
    ("backbone",),
    buckets=_SECONDS,
    registry=REGISTRY,
)
ENGINE_SECONDS = Histogram(
    "graft_engine_seconds",
    "Of one batch, decoded.",
    ("backbone",),
    buckets=_SECONDS,
    registry=REGISTRY,
)
BATCH_IMAGES = Histogram(
    "graft_batch_images", "Images in a batch.", ("backbone",), buckets=_IMAGES, registry=REGISTRY
)
QUEUE_IMAGES = Gauge(
    "graft_queue_images", "Images admitted and not yet answered.", ("backbone",), registry=REGISTRY
)
CACHED_FEATURES = Counter(
    "graft_cached_features", "Images looked up in the feature cache.", ("found",), registry=REGISTRY
)
LOADED = Gauge(
    "graft_model_loaded",
    "1 for every version that is served.",
    ("model", "version"),
    registry=REGISTRY,
)


# Noted since it was last written: metric, labels and amount.
_noted: list[tuple[Counter | Histogram, tuple[str, ...], float]] = []
_MAX_NOTED = 10_000


def note(metric: Counter | Histogram, labels: tuple[str, ...], amount: float = 1) -> None:
    """Count or observe `amount` a moment later: in batches each costs a third.

    For the event loop's thread alone, as all functions here are.
    """
    _noted.append((metric, labels, amount))
    if len(_noted) > _MAX_NOTED:
        write_noted()


def write_noted() -> None:
    """Write the noted amounts into their series, before these are read or one is dropped."""
    by_series: dict[tuple[Counter | Histogram, tuple[str, ...]], list[float]] = {}
    for metric, labels, amount in _noted:
        by_series.setdefault((metric, labels), []).append(amount)
    _noted.clear()
    for (metric, labels), amounts in by_series.items():
        series = metric.labels(*labels) if labels else metric
        if isinstance(series, Counter):
            series.inc(sum(amounts))
        else:
            for amount in amounts:
                series.observe(amount)


def render(queue_images: Iterable[tuple[str, int]], loaded: Iterable[tuple[str, int]]) -> bytes:
    """The text format, with each backbone's queue and the loaded versions as they are now."""
    write_noted()
    QUEUE_IMAGES.clear()
    for backbone, num_images in queue_images:
        QUEUE_IMAGES.labels(backbone).set(num_images)
    LOADED.clear()
    for model, version in loaded:
        LOADED.labels(model, str(version)).set(1)
    return generate_latest(REGISTRY)


def forget(model: str, version: int) -> None:
    """Drop the series of a version that is no longer served."""
    write_noted()
    for metric in (IMAGES, PREDICT_SECONDS, REJECTED, SHADOW):
        metric.remove_by_labels({"model": model, "version": str(version)})


def forget_backbone(backbone: str) -> None:
    """Drop the series of a backbone that is closed."""
    write_noted()
    for metric in (QUEUE_SECONDS, ENGINE_SECONDS, BATCH_IMAGES):
        metric.remove_by_labels({"backbone": backbone})
