"""Activations are kept as the nearest bfloat16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from finetune.training.activations import Bf16File

BITS = {
    "NaN": 0x7FC00000,
    "NaN with every bit set": 0x7FFFFFFF,
    "negative NaN": 0xFFFFFFFF,
    "infinity": 0x7F800000,
    "negative infinity": 0xFF800000,
    "largest float32": 0x7F7FFFFF,
    "smallest denormal": 0x00000001,
    "largest denormal": 0x007FFFFF,
    "denormal halfway between two": 0x00018000,
    "negative zero": 0x80000000,
    "halfway, to even below": 0x3F808000,
    "halfway, to even above": 0x3F818000,
}


def read_back(values: np.ndarray, folder: Path) -> torch.Tensor:
    file = Bf16File(folder / "activations", len(values), values.shape[1])
    file[np.arange(len(values))] = values
    return torch.stack([file.read(row) for row in range(len(values))])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("infinity", 0x7F80),
        ("negative infinity", 0xFF80),
        ("largest float32", 0x7F80),
        ("smallest denormal", 0x0000),
        ("largest denormal", 0x0080),
        ("denormal halfway between two", 0x0002),
        ("negative zero", 0x8000),
        ("halfway, to even below", 0x3F80),
        ("halfway, to even above", 0x3F82),
    ],
)
def test_a_number_is_rounded_to_the_nearest(name: str, expected: int, tmp_path: Path) -> None:
    found = read_back(np.array([[BITS[name]]], np.uint32).view(np.float32), tmp_path)
    assert found.view(torch.int16).numpy().view(np.uint16).item() == expected


@pytest.mark.parametrize("name", [name for name in BITS if "NaN" in name])
def test_nan_stays_nan(name: str, tmp_path: Path) -> None:
    assert read_back(np.array([[BITS[name]]], np.uint32).view(np.float32), tmp_path).isnan().all()


def test_numbers_keep_the_bits_that_kept_activations_have_on_disk(tmp_path: Path) -> None:
    """Rounded to nearest, ties to even: a resumed run reads what it wrote before."""
    bits = np.random.default_rng(0).integers(0, 0xFFFFFFFF, (16, 1024), np.uint32)
    values = bits.view(np.float32)
    expected = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    found = read_back(values, tmp_path).view(torch.int16).numpy().view(np.uint16)
    is_number = ~np.isnan(values)
    assert np.array_equal(found[is_number], expected[is_number])
    assert (found[~is_number] & 0x7FFF > 0x7F80).all()
