"""What goes out, as pydantic models: the answers' shapes and the OpenAPI page's. What comes in is read by `uploads`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from service.inference.rollout import Rollout


class ErrorDetail(BaseModel):
    """Why there is no answer: `code` for programs, `message` with what to do for people."""

    code: str
    message: str


class ErrorResponse(BaseModel):
    """The shape of every error of our own routes."""

    error: ErrorDetail


class ProtocolError(BaseModel):
    """The shape of every error of TF-Serving, the Open Inference Protocol and Hugging Face."""

    error: str


class LabelScore(BaseModel):
    """A label and its calibrated probability."""

    label: str
    score: float


class Prediction(LabelScore):
    """The best label of an image and its `top_k` labels, best first."""

    unsure: bool | None = Field(
        default=None,
        description="Whether no label's score, or more than one's, reaches the model's threshold: none fits, or several could be true at "
        "the coverage that the model was made for. null where the model has no threshold.",
    )
    top: list[LabelScore]


class MultiLabelPrediction(BaseModel):
    """What a model whose images have any number of labels says of one: each score is a label's own, and they do not add up to one."""

    labels: list[LabelScore] = Field(
        description="The labels whose score reaches the model's threshold for it, best first; perhaps none, perhaps several."
    )
    top: list[LabelScore] = Field(description="All labels, or the `top_k` asked for, best first.")


class PredictResponse(BaseModel):
    """One entry per image, in the order of the request; an image that could not be read has an `error` in its place."""

    model: str
    version: int
    predictions: list[Prediction | MultiLabelPrediction | ErrorResponse]


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
        description="For how many images like those it was made with the labels that reach the threshold hold the true one."
    )
    threshold: float | None = Field(
        description="An answer is unsure unless the score of exactly one label is at least this."
    )
    thresholds: list[float] | None = Field(
        description="For each of the labels the score from which on a multi-label model's answer names it; null for other models."
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
    """A version that is in the repository and not served; with no version, a rollout that is not followed."""

    name: str
    version: int | None
    reason: str


class ModelsResponse(BaseModel):
    """What is served, and what is not and why."""

    models: list[ModelInfo]
    refused: list[RefusedModel]


class RolloutResponse(BaseModel):
    """A model's rollout after a change; not `persisted`, it ends with the process, because the repository cannot be written."""

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
    """How this process is."""

    ready: bool
    alive: bool
    draining: bool
    reason: str = Field(description="Why it is not ready or not alive.")
    uptime_seconds: float
    num_models: int
    num_refused: int
    buffered_bytes: int = Field(description="Of request bodies in memory.")
    backbones: list[BackboneStatus]
