"""What goes out, as pydantic models: the answers' shapes and the OpenAPI page's. What comes in is read by `uploads`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


class ErrorDetail(BaseModel):
    """Why there is no answer: `code` for programs, `message` with what to do for people."""

    code: str
    message: str


class ErrorResponse(BaseModel):
    """The one shape of every error."""

    error: ErrorDetail


class LabelScore(BaseModel):
    """A label and its calibrated probability."""

    label: str
    score: float


class Prediction(LabelScore):
    """The best label of an image and its `top_k` labels, best first."""

    top: list[LabelScore]


class PredictResponse(BaseModel):
    """One entry per image, in the order of the request; an image that could not be read has an `error` in its place."""

    model: str
    version: int
    predictions: list[Prediction | ErrorResponse]


class ModelInfo(BaseModel):
    """A model that is being served."""

    name: str
    version: int
    labels: list[str]
    architecture: str
    fingerprint: str = Field(description="Models with equal fingerprints share one backbone, its engine and its queue.")
    metrics: dict[str, Any]
    device: str
    engine: str
    precision: str
    batch_size: int
    num_streams: int
    images_per_second: float = Field(description="Of the backbone alone, measured when it was loaded.")


class RefusedModel(BaseModel):
    """A version that is in the repository and not served."""

    name: str
    version: int
    reason: str


class ModelsResponse(BaseModel):
    """What is served, and what is not and why."""

    models: list[ModelInfo]
    refused: list[RefusedModel]
