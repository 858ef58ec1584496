"""What an option allows is said in words that follow from its type and limits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, SecretStr, create_model

from models.allowed import describe_allowed


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (int, "a whole number"),
        (Annotated[int, Field(ge=1)], "a whole number from 1 up"),
        (Annotated[int | None, Field(ge=32, le=1024)], "a whole number from 32 to 1024"),
        (Annotated[int, Field(gt=0, lt=2**32)], "a whole number from 1 to 4294967295"),
        (Annotated[int, Field(le=5)], "a whole number to 5"),
        (float, "a number"),
        (Annotated[float, Field(ge=0)], "a number from 0 up"),
        (Annotated[float, Field(gt=0, lt=1)], "a number above 0 and below 1"),
        (Annotated[float, Field(gt=0.5, allow_inf_nan=False)], "a number above 0.5"),
        (bool, "true or false"),
        (Literal["auto", "cpu", "cuda"], "auto, cpu or cuda"),
        (Literal["auto", "cpu"] | None, "auto or cpu"),
        (Literal["only"], "only"),
        (Path | None, "a path"),
        (str, "text"),
        (SecretStr | None, "text"),
    ],
)
def test_words(kind: Any, words: str) -> None:
    assert (
        describe_allowed(create_model("Options", option=(kind, ...)).model_fields["option"])
        == words
    )
