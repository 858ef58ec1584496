"""Whole numbers as clients write them, of any length."""

from __future__ import annotations


def parse_whole_number(text: str, most: int) -> int | None:
    """The number from 0 to `most` that ASCII digits stand for, None for any other text.

    `int` raises for more than 4,300 digits, zeros in front included.
    """
    if not (text.isascii() and text.isdigit()):
        return None
    digits = text.lstrip("0") or "0"
    return int(digits) if len(digits) <= len(str(most)) and int(digits) <= most else None
