"""The answers of Graft's own routes, as pydantic models, which are also the OpenAPI schemas."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from service.inference.rollout import Rollout
from service.tasks.choose import AnyPrediction


class ErrorDetail(BaseModel):
    """Why there is no answer: `code` for programs, `message` with the way out for people."""

    code: str
    message: str


class ErrorResponse(BaseModel):
    """Every error of Graft's own routes."""

    error: ErrorDetail


class ProtocolError(BaseModel):
    """Every error of TF-Serving, the Open Inference Protocol and Hugging Face."""

    error: str


class PredictResponse(BaseModel):
    """One entry per image, in the order of the request; an unreadable image has an `error`."""

    model: str
    version: int
    predictions: list[AnyPrediction | ErrorResponse]


class AllResponse(BaseModel):
    """The answer to model=all: what each model says, by name."""

    models: list[PredictResponse]


class ModelInfo(BaseModel):
    """A model that is being served, as its default version."""

    name: str
    version: int
    versions: list[int] = Field(description="Every version that can be asked for by number.")
    rollout: Rollout
    labels: list[str]
    architecture: str
    fingerprint: str = Field(
        description="Models with equal fingerprints share one backbone, its engine and its queue."
    )
    metrics: dict[str, Any]
    coverage: float | None = Field(
        description="For which fraction of images like those of its training the true label is "
        "among those that reach the threshold."
    )
    threshold: float | None = Field(
        description="An answer is unsure unless the score of exactly one label is at least this."
    )
    thresholds: list[float] | None = Field(
        description="The least score at which a multi-label model's answer names each label; null "
        "for other models."
    )
    device: str
    engine: str
    precision: str
    batch_size: int
    num_streams: int
    images_per_second: float = Field(
        description="Of the backbone alone, measured when it was loaded."
    )


class RefusedModel(BaseModel):
    """A version that is not served, or a rollout (no version) that is not followed, and why."""

    name: str
    version: int | None
    reason: str


class ModelsResponse(BaseModel):
    """The models that are served, and those that were refused."""

    models: list[ModelInfo]
    refused: list[RefusedModel]


class RolloutResponse(BaseModel):
    """A model's rollout after a change.

    Not `persisted`, it ends with the process: the repository cannot be written.
    """

    model: str
    rollout: Rollout
    versions: list[int]
    persisted: bool


class BackboneStatus(BaseModel):
    """One engine and its queue."""

    fingerprint: str
    device: str
    engine: str
    precision: str
    batch_size: int
    num_streams: int
    images_per_second: float = Field(description="As measured under load, else when it was loaded.")
    queue_images: int = Field(description="Admitted and not yet answered.")
    stalled_seconds: float = Field(description="How long the oldest batch has been in the engine.")
    num_versions: int = Field(description="Checkpoints that share it.")


class StatusResponse(BaseModel):
    """The health and the load of this process."""

    ready: bool
    alive: bool
    draining: bool
    reason: str = Field(description="Why it is not ready or not alive.")
    uptime_seconds: float
    num_models: int
    num_refused: int
    buffered_bytes: int = Field(description="Of request bodies in memory.")
    backbones: list[BackboneStatus]
