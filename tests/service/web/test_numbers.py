"""Whole numbers of any length are read or refused, never an error inside."""

from __future__ import annotations

import pytest

from service.web.numbers import parse_whole_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("7", 7),
        ("100", 100),
        ("101", None),
        ("0" * 5000, 0),
        ("0" * 5000 + "12", 12),
        ("1" * 5000, None),
        ("0000000001" + "0" * 5000, None),
        ("", None),
        ("-1", None),
        ("+1", None),
        ("1.0", None),
        ("1_0", None),
        (" 1", None),
        ("٣", None),
    ],
)
def test_digits_are_a_number_up_to_the_largest(text: str, number: int | None) -> None:
    assert parse_whole_number(text, 100) == number
